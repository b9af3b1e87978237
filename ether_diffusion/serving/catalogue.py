"""Where adapters are, by name: in one folder, or wherever something else that answers the same questions says."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Protocol

from ether_diffusion.errors import InputError, printable

SUFFIX = ".safetensors"
LONGEST_NAME = 200
"""In bytes; file systems take 255, with the ending."""


class UnknownAdapter(InputError):
    """There is no adapter of this name."""


class Catalogue(Protocol):
    """Knows where adapters are; it is asked anew for every request."""

    def names(self) -> list[str]:
        """All that are there, in order; whether they fit is seen when they are read."""

    def find(self, name: str) -> Path:
        """The file or folder of an adapter. Raises `InputError` where there is none of this name."""


class FolderCatalogue:
    """The files `<name>.safetensors` and the folders `<name>/` of a folder. Raises `InputError` if it is not there."""

    def __init__(self, folder: str | Path) -> None:
        check_folder(folder)
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """All that are there, in order."""
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
