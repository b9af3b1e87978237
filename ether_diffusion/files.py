"""Files and folders that appear complete or not at all.

Whatever is written goes under a hidden name beside its place, is flushed to the disk, and takes its name in one step:
a full disk, a kill or a power cut leaves what was there before. Other users may read it as far as the umask lets them,
also where the library that wrote it says otherwise: safetensors writes files that their owner alone can read.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".tmp"
ABANDONED_AFTER = 3600.0
"""Age in seconds from which a hidden half-written file is one that a killed process left: no save takes so long."""


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` under a name in one step, in place of what has that name.

    Raises:
        OSError: the disk is full, or the folder cannot be written; names the file, which is as it was.
    """
    remove_abandoned(path)
    partial = _hidden(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror}; nothing was saved", str(path)) from error
        raise
    sync_folder(path.parent)  # the new name is on the disk once the folder is


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A path for a new file or folder, which takes its name when the context ends; if that fails, nothing is left.

    Raises:
        FileExistsError: there is a file, or a folder with content, under that name.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} exists already, and nothing is overwritten: choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder around it: libraries write a file under the name that they are given, some beside others.
    around = _hidden(path)
    around.mkdir()
    try:
        yield around / path.name
        give_usual_modes(around)
        (around / path.name).rename(path)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def replace_folder(path: Path, contents: dict[str, bytes]) -> None:
    """Put a folder of these files under a name, in place of what has that name.

    Raises:
        OSError: the disk is full, or the parent folder cannot be written; nothing new is left then.
    """
    partial = _hidden(path)
    partial.mkdir()
    try:
        for name, content in contents.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_entries(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """A hidden folder to write into; when the context ends, what is in it moves into `folder`, else it is removed.

    Each file and folder takes the place of what has its name there; other entries of `folder` stay.

    Args:
        folder: made if need be.
        last: name of the entry that is moved when all others are there: the one by which readers know the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder / "entries")
    partial = _hidden(folder / "entries")
    new, old = partial / "new", partial / "old"
    try:
        for each in (partial, new, old):
            each.mkdir()
        yield new
        give_usual_modes(partial)
        for entry in sorted(new.iterdir(), key=lambda each: (each.name == last, each.name)):
            target = folder / entry.name
            if target.is_dir() and not target.is_symlink():  # a folder cannot be replaced in one step
                target.rename(old / entry.name)
            os.replace(entry, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Let all files in a folder of our own be read and written by those by whom a new file could be."""
    probe = _hidden(folder / "mode")  # the umask itself can only be asked for by setting it, for the whole process
    probe.touch(exist_ok=False)
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and (mode := stat.S_IMODE(path.stat().st_mode)) | usual != mode:
            path.chmod(mode | usual)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def remove_abandoned(path: Path) -> None:
    """Remove what killed saves under this name left; younger leftovers may be another process at work."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):  # another was quicker, or it is not ours to remove
            if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk. Some network folders cannot be synced; the files in them are."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _hidden(path: Path) -> Path:
    """An unused hidden name beside a path. Not tempfile's: what that makes, other users may not read."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


def checksum(folder: Path) -> str:
    """SHA-256 over the weight files of a pipeline folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
