"""Adapters of a folder, held on the host as they are read; the least used ones leave when the memory is spent."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ether_diffusion.errors import EtherFileError, InputError, printable

SUFFIX = ".safetensors"
READS_AT_MOST = 5
LONGEST_NAME = 200
"""In bytes; file systems take 255, with the ending."""
Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, modification time in ns, size and inode of every file of an adapter."""


class UnknownAdapter(InputError):
    """There is no adapter of this name."""


class Store:
    """Adapters by name: the files `<name>.safetensors` and the folders `<name>/` of one folder.

    What is given out stays as it is: who holds it is not concerned when its file is replaced, deleted or evicted here.

    Args:
        folder: where adapters are; looked at whenever one is asked for.
        read: makes what is held (with `nbytes`) of a path; raises where the adapter does not fit.
        limit: bytes that may be held. An adapter that is larger is read every time.

    Attributes:
        nbytes: bytes that are held.
        loads: adapters read so far.
        reading: a lock, held while one is read; those that are held are given out all the same.
    """

    def __init__(self, folder: str | Path, read: Callable[[Path], Any], *, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        check_folder(folder)
        self._read = read
        self._held: OrderedDict[str, tuple[Stamp, Any]] = OrderedDict()  # least used first
        self._lock, self.reading = threading.Lock(), threading.Lock()
        self.nbytes = self.loads = 0

    def names(self) -> list[str]:
        """All that are there, in order; whether they fit is seen when they are read."""
        found = {self._name(path) for path in self.folder.iterdir() if not path.name.startswith(".")}
        return sorted(found - {None})

    @staticmethod
    def _name(path: Path) -> str | None:
        if path.is_dir():
            return path.name if any(path.glob(f"*{SUFFIX}")) else None
        return path.stem if path.suffix == SUFFIX and path.is_file() else None

    def find(self, name: str) -> Path:
        """The file or folder of an adapter.

        Raises:
            UnknownAdapter: no such name; lists near ones.
            InputError: a file and a folder have it.
        """
        if is_name(name):
            candidates = (self.folder / f"{name}{SUFFIX}", self.folder / name)
            found = [path for path in candidates if self._name(path) == name]
            if len(found) > 1:
                raise InputError(f"{printable(name)!r} is both a file and a folder of the adapters: rename one")
            if found:
                return found[0]
        known = self.names()
        near = difflib.get_close_matches(name[:80], known, n=5, cutoff=0.5)
        hint = f"near it: {', '.join(near)}" if near else f"there are {', '.join(known[:10]) or 'none'}"
        hint += f" and {len(known) - 10} more" if not near and len(known) > 10 else ""
        raise UnknownAdapter(f"there is no adapter {printable(name[:80])!r}; {printable(hint)}")

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


def check_folder(folder: str | Path) -> None:
    """Raises InputError where there is no such folder."""
    if not Path(folder).is_dir():
        raise InputError(f"adapters={str(folder)!r}: there is no such folder")


def is_name(name: str) -> bool:
    """Whether this can be the name of an entry of a folder, and is no path: nothing outside can be asked for."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half of a character, which JSON can hold
        return False
    return 0 < size <= LONGEST_NAME and name == Path(name).name and name[0] != "." and not set(name) & set("\0\\")


def _stamp(path: Path) -> Stamp:
    """() where nothing is."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        states = [(file.name, file.stat()) for file in files if file.suffix in (SUFFIX, ".json")]
    except FileNotFoundError:  # deleted meanwhile
        return ()
    return tuple((name, state.st_mtime_ns, state.st_size, state.st_ino) for name, state in states)
