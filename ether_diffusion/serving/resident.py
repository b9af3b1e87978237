"""The adapters that an engine serves: from their files into main memory, from there into a row for each request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import AdapterFile
from ether_diffusion.errors import InputError
from ether_diffusion.serving.catalogue import Catalogue
from ether_diffusion.serving.rows import AdapterRows, HostAdapter
from ether_diffusion.serving.store import Store


class ResidentAdapters:
    """Adapters by name, and the rows on the device that hold those of the requests that run.

    Args:
        pipe: what they are for.
        adapters: the folder that they are in, or a catalogue of them.
        max_rows: requests that may run at a time.
        host_bytes: of adapters in main memory.

    Attributes:
        store: those that were read.
    """

    def __init__(
        self, pipe: DiffusionPipeline, adapters: str | Path | Catalogue, *, max_rows: int, host_bytes: int
    ) -> None:
        self._pipe, self._max_rows = pipe, max_rows
        self.store = Store(adapters, lambda path: self._rows.read(path), limit=host_bytes)
        self._rows = AdapterRows(pipe, max_rows=max_rows)
        self._free = list(range(max_rows, 0, -1))

    def get(self, name: str) -> HostAdapter:
        """An adapter as it is now; raises as `Store.get`."""
        return self.store.get(name)

    def file(self, name: str) -> AdapterFile:
        """The file of an adapter as it is now, for requests that run alone; raises as `Store.find` and the loader."""
        return find_adapter_file(self.store.find(name))

    def check(self, path: Path) -> None:
        """Read an adapter from anywhere with all checks, and let go of it; raises as `AdapterRows.read`."""
        with self.store.reading:
            self._rows.read(path)

    def take_row(self, adapters: Sequence[tuple[HostAdapter, float]]) -> int:
        """A row with these adapters; 0, which has none, for none."""
        if not adapters:
            return 0
        if not self._free:
            raise InputError(f"all {self._max_rows} rows of adapters are taken")
        self._rows.assign(self._free[-1], adapters)
        return self._free.pop()

    def free_row(self, row: int) -> None:
        """Give a row back."""
        if row:
            self._rows.clear(row)
            self._free.append(row)

    def rows(self, component: str, indices: Sequence[int]) -> AbstractContextManager:
        """The context of a forward whose rows have the adapters of these."""
        return self._rows.rows(component, indices)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The pipeline as it was without this, while no row is taken; nothing is read meanwhile."""
        with self.store.reading:
            self._rows.close()
            try:
                yield
            finally:
                self._rows = AdapterRows(self._pipe, max_rows=self._max_rows)

    def close(self) -> None:
        """Leave the pipeline as it was."""
        self._rows.close()
