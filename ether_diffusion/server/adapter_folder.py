"""The folder of adapters as clients see it: what is there, and files that come and go in one step."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastapi.concurrency import run_in_threadpool

from ether_diffusion.errors import InputError
from ether_diffusion.files import PARTIAL_SUFFIX, sync_folder
from ether_diffusion.server.errors import ApiError, of_engine, of_file
from ether_diffusion.server.messages import Adapter
from ether_diffusion.serving.catalogue import SUFFIX, FolderCatalogue, is_name

Check = Callable[[Path], Awaitable[None]]
"""Raises ApiError for an adapter file that cannot be used."""


class AdapterFolder:
    """Adapters by name. Several processes may use one folder: each change is one step.

    folder: None holds nothing, and takes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._catalogue = None if folder is None else FolderCatalogue(folder)

    def names(self) -> list[str]:
        """All, in order."""
        return [] if self._catalogue is None else self._catalogue.names()

    def adapters(self) -> list[Adapter]:
        """All with their sizes and times; what is deleted meanwhile is left out."""
        found = []
        for name in self.names():
            try:
                found.append(self._describe(name))
            except (InputError, OSError):
                continue
        return found

    def _describe(self, name: str) -> Adapter:
        path = self._catalogue.find(name)
        states = [each.stat() for each in (path.iterdir() if path.is_dir() else [path]) if each.is_file()]
        newest = max((state.st_mtime for state in states), default=0)
        return Adapter(id=name, bytes=sum(state.st_size for state in states), created=int(newest))

    async def add(self, name: str, content: BinaryIO, check: Check) -> Adapter:
        """Check a file and put it under a name, in place of the file that has it; requests that run keep theirs.

        Raises:
            ApiError: 400 no name, 409 a folder has it, 422 a file that does not fit, 507 a full disk. Nothing has
                changed then.
        """
        folder = self._catalogue.folder
        if not is_name(name) or not name.isprintable():
            raise ApiError(400, f"name: {name[:80]!r} is no name of a file", param="name")
        if (folder / name).is_dir():
            raise ApiError(409, f"{name} is a folder of the adapters: delete it first", param="name")
        try:
            with _hidden_folder(folder) as hidden:
                path = hidden / f"{name}{SUFFIX}"
                await run_in_threadpool(_write, path, content)
                await check(path)
                os.replace(path, folder / path.name)
            sync_folder(folder)
            return self._describe(name)
        except OSError as error:
            raise of_file(error, folder, name) from error

    def remove(self, name: str) -> None:
        """Delete an adapter; requests that run keep it.

        Raises:
            ApiError: 404, there is none of this name.
        """
        try:
            path = self._catalogue.find(name)
            with _hidden_folder(self._catalogue.folder) as hidden:
                path.rename(hidden / path.name)  # a folder goes in one step, too; with the hidden one it is deleted
        except FileNotFoundError as error:  # another was quicker
            raise ApiError(404, f"there is no adapter {name!r}", code="adapter_not_found") from error
        except InputError as error:
            raise of_engine(error) from error
        except OSError as error:
            raise of_file(error, self._catalogue.folder, name) from error


@contextmanager
def _hidden_folder(folder: Path):
    """A folder that the catalogue does not see; it goes, with what is in it, in the end."""
    hidden = folder / f".upload.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
    hidden.mkdir()
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _write(path: Path, content: BinaryIO) -> None:
    with path.open("xb") as file:
        shutil.copyfileobj(content, file, 2**20)
        file.flush()
        os.fsync(file.fileno())
