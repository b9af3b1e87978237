"""Adapters by name, held on the host as they are read; the least used ones leave when the memory is spent."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ether_diffusion.errors import EtherFileError
from ether_diffusion.serving.catalogue import SUFFIX, Catalogue, FolderCatalogue, UnknownAdapter

__all__ = ["Store", "UnknownAdapter"]

READS_AT_MOST = 5
Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, modification time in ns, size and inode of every file of an adapter."""


class Store:
    """Adapters by name, from a folder or whatever else knows where they are.

    What is given out stays as it is: who holds it is not concerned when its file is replaced, deleted or evicted here.

    Args:
        adapters: a folder, or a catalogue; looked at whenever one is asked for.
        read: makes what is held (with `nbytes`) of a path; raises where the adapter does not fit.
        limit: bytes that may be held. An adapter that is larger is read every time.

    Attributes:
        nbytes: bytes that are held.
        loads: adapters read so far.
        reading: a lock, held while one is read; those that are held are given out all the same.
    """

    def __init__(self, adapters: str | Path | Catalogue, read: Callable[[Path], Any], *, limit: int) -> None:
        self.catalogue = FolderCatalogue(adapters) if isinstance(adapters, str | Path) else adapters
        self.limit = limit
        self._read = read
        self._held: OrderedDict[str, tuple[Stamp, Any]] = OrderedDict()  # least used first
        self._lock, self.reading = threading.Lock(), threading.Lock()
        self.nbytes = self.loads = 0

    def names(self) -> list[str]:
        """All that are there, in order; whether they fit is seen when they are read."""
        return self.catalogue.names()

    def find(self, name: str) -> Path:
        """The file or folder of an adapter; raises as the catalogue's."""
        return self.catalogue.find(name)

    def get(self, name: str) -> Any:
        """The adapter of this name, as its files are now.

        Raises:
            UnknownAdapter, InputError: as `find`.
            EtherFileError: it does not fit, or was written to all the while that it was read.
        """
        for _ in range(READS_AT_MOST):
            path = self.find(name)
            stamp = _stamp(path)
            if (adapter := self._held_at(name, stamp)) is not None:
                return adapter
            with self.reading:
                if (adapter := self._held_at(name, stamp)) is not None:  # read by another thread meanwhile
                    return adapter
                adapter = self._read_whole(path, stamp)
                if adapter is not None:
                    self._hold(name, stamp, adapter)  # before another thread, which waits to read it, goes on
                    return adapter
        raise EtherFileError(f"{name}: was changed each of the {READS_AT_MOST} times that it was read")

    def _held_at(self, name: str, stamp: Stamp) -> Any | None:
        with self._lock:
            held = self._held.get(name)
            if held is None or held[0] != stamp:
                return None
            self._held.move_to_end(name)
            return held[1]

    def _read_whole(self, path: Path, stamp: Stamp) -> Any | None:
        """What is at a path; None if its files are others afterwards than before, so that it may be half of each."""
        try:
            adapter = self._read(path)
        except (ValueError, OSError):
            if _stamp(path) == stamp:
                raise
            return None
        self.loads += 1
        return adapter if _stamp(path) == stamp else None

    def _hold(self, name: str, stamp: Stamp, adapter: Any) -> None:
        with self._lock:
            self._drop(name)
            if adapter.nbytes > self.limit:
                return
            self._held[name] = (stamp, adapter)
            self.nbytes += adapter.nbytes
            while self.nbytes > self.limit:
                self._drop(next(iter(self._held)))

    def _drop(self, name: str) -> None:
        if name in self._held:
            self.nbytes -= self._held.pop(name)[1].nbytes


def _stamp(path: Path) -> Stamp:
    """() where nothing is."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        states = [(file.name, file.stat()) for file in files if file.suffix in (SUFFIX, ".json")]
    except FileNotFoundError:  # deleted meanwhile
        return ()
    return tuple((name, state.st_mtime_ns, state.st_size, state.st_ino) for name, state in states)
