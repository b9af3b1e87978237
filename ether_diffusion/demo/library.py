"""The adapters on offer: what lies in one folder, each with its image and what its file says."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.errors import InputError, printable
from ether_diffusion.files import replace_file

IMAGE_NAME = "image.png"
IMAGE_NAMES = (IMAGE_NAME, "picture.png", "grid.png")  # picture.png is what version 0.1 wrote
LONGEST_NAME, MOST_NAME_BYTES = 40, 200
FORBIDDEN = frozenset('/\\:*?"<>|,=')
"""In names: what some system does not allow in a folder's, and what separates adapters in settings."""
JOINERS = "\u200d\ufe0f"
"""Of emoji that are made of several."""
OWNERS_NAME = ".owners.json"
LONGEST_PROMPT_SHOWN = 200


@dataclass(frozen=True)
class Adapter:
    """One adapter of the folder.

    name: of its folder, or its file without the ending; what users choose it by.
    path: its file.
    image: a file, or None.
    problem: why it cannot be used, in words, or None.
    stamp: differs when the file does.
    """

    name: str
    path: Path
    image: Path | None
    prompt: str
    methods: tuple[str, ...]
    parameters: int
    size: int
    is_control: bool
    problem: str | None
    stamp: tuple[int, int]


def clean_name(text: str) -> str:
    """A name for a folder, as a user typed it, without spaces around it; in any script.

    Raises:
        InputError: it cannot be the name of a folder everywhere; says why.
    """
    name = unicodedata.normalize("NFC", text.strip())
    if reason := _why_unsafe(name):
        raise InputError(f"Name: got {printable(text[:80])!r}, which {reason}; such as my-dog or perro pequeño fits")
    return name


def _why_unsafe(name: str) -> str | None:
    """Why a text cannot be the name of a folder; None where it can."""
    if not name:
        return "is empty"
    if len(name) > LONGEST_NAME or len(name.encode(errors="replace")) > MOST_NAME_BYTES:
        return f"is longer than {LONGEST_NAME} letters"
    if not all(letter.isprintable() or letter in JOINERS for letter in name):
        return "has characters that cannot be shown"
    if found := sorted(set(name) & FORBIDDEN):
        return f"has {' '.join(found)}"
    if name[0] == "." or name[-1] in ". ":
        return "begins or ends with a dot"
    return None


class Library:
    """The adapters in a folder: `<name>/pytorch_ether_weights.safetensors` or `<name>.safetensors`.

    Links that lead out of the folder are left out. A file is read again when it changes.

    Args:
        folders: where to look; new adapters go into the last one. A name in a later folder hides one in an earlier.

    Raises:
        InputError: a folder that is not there.
    """

    def __init__(self, *folders: str | Path) -> None:
        self.folders = [Path(folder).resolve() for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"--adapters {folder}: there is no such folder")
        self._known: dict[Path, Adapter] = {}
        self._lock = threading.Lock()

    def adapters(self) -> list[Adapter]:
        """All of them, by name, also those that cannot be used."""
        with self._lock:
            found = {}
            for folder in self.folders:
                for path in self._files(folder):
                    adapter = self._look(path)
                    found[adapter.name] = adapter
            return [found[name] for name in sorted(found)]

    def get(self, name: str) -> Adapter:
        """The adapter of this name, which can be used.

        Raises:
            InputError: there is none, or it cannot be used.
        """
        adapters = {each.name: each for each in self.adapters()}
        if name not in adapters:
            known = ", ".join(adapters) or "none"
            raise InputError(f"there is no adapter {printable(str(name)[:80])!r}; on offer are {known}")
        if problem := adapters[name].problem:
            raise InputError(f"the adapter {name} cannot be used: {problem}")
        return adapters[name]

    def names(self) -> list[str]:
        """Of all that can be used; with `find`, for the engine."""
        return [each.name for each in self.adapters() if not each.problem]

    def find(self, name: str) -> Path:
        """The file of an adapter; raises as `get`."""
        return self.get(name).path

    def add(self, name: str, source: Path, owner: str = "") -> str:
        """Take an adapter in, a folder that training wrote or a file; the name that it gets, numbered where taken."""
        file = source / WEIGHTS_NAME if source.is_dir() else source
        with self._lock:
            numbered = (name, *(f"{name}-{k}" for k in range(2, 10_000)))
            free = next(each for each in numbered if not self._is_taken(each))
            partial = self.folders[-1] / f".{free}"
            partial.mkdir()
            shutil.copyfile(file, partial / WEIGHTS_NAME)
            partial.rename(self.folders[-1] / free)
            self._write_owners({**self._owners(), free: _digest(owner)} if owner else self._owners())
            return free

    def belongs_to(self, name: str, owner: str) -> bool:
        """Whether an owner has added an adapter, and so may change it."""
        return bool(owner) and self._owners().get(name) == _digest(owner)

    def rename(self, name: str, new: str, owner: str) -> str:
        """Give an adapter of an owner's another name; that.

        Raises:
            InputError: it is not his, or the name does not fit or is taken.
        """
        new = clean_name(new)
        with self._lock:
            folder = self._own_folder(name, owner)
            if self._is_taken(new):
                raise InputError(f"Name: there is an adapter {new} already")
            folder.rename(self.folders[-1] / new)
            owners = self._owners()
            self._write_owners({new if each == name else each: whose for each, whose in owners.items()})
        return new

    def delete(self, name: str, owner: str) -> None:
        """Remove an adapter of an owner's.

        Raises:
            InputError: it is not his.
        """
        with self._lock:
            folder = self._own_folder(name, owner)
            hidden = folder.with_name(f".{name}-deleted")
            folder.rename(hidden)  # at once gone from the list, whatever becomes of its files
            shutil.rmtree(hidden, ignore_errors=True)
            self._write_owners({each: whose for each, whose in self._owners().items() if each != name})

    def replace(self, name: str, content: bytes, owner: str) -> None:
        """Give an adapter of an owner's another file, at once.

        Raises:
            InputError: it is not his.
        """
        with self._lock:
            replace_file(self._own_folder(name, owner) / WEIGHTS_NAME, content)

    def _own_folder(self, name: str, owner: str) -> Path:
        folder = self.folders[-1] / name
        if not self.belongs_to(name, owner) or _why_unsafe(name) or not folder.is_dir():
            raise InputError(f"the adapter {printable(name[:80])} is not yours to change")
        return folder

    def _is_taken(self, name: str) -> bool:
        taken = {self._name(path) for each in self.folders for path in self._files(each)}
        return name in taken or (self.folders[-1] / name).exists()

    def _owners(self) -> dict[str, str]:
        """Digests of who added an adapter, by its name."""
        try:
            found = json.loads((self.folders[-1] / OWNERS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write_owners(self, owners: dict[str, str]) -> None:
        if owners or (self.folders[-1] / OWNERS_NAME).exists():
            replace_file(self.folders[-1] / OWNERS_NAME, json.dumps(owners, ensure_ascii=False, indent=1).encode())

    def _files(self, folder: Path) -> list[Path]:
        candidates = [*folder.glob("*.safetensors"), *folder.glob(f"*/{WEIGHTS_NAME}")]
        return [
            path
            for path in sorted(candidates)
            if not _why_unsafe(self._name(path)) and path.is_file() and _within(path, folder)
        ]

    @staticmethod
    def _name(path: Path) -> str:
        return path.parent.name if path.name == WEIGHTS_NAME else path.stem

    def _look(self, path: Path) -> Adapter:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        beside = [path.parent / name for name in IMAGE_NAMES] if path.name == WEIGHTS_NAME else []
        image = next((each for each in beside if each.is_file() and _within(each, path.parent)), None)
        known = self._known.get(path)
        if known is not None and (known.stamp, known.image) == (stamp, image):
            return known
        try:
            file, problem = find_adapter_file(path), None
        except (ValueError, OSError) as error:
            # Where the folder lies is nobody's business on the page.
            file, problem = AdapterFile({}, {}), str(error).replace(str(path), path.name)
        if problem is None and set(file.weights) - {CONTROL}:
            problem = "it replaces weights of the base model, which would show in the images of others"
        self._known[path] = Adapter(
            name=self._name(path),
            path=path,
            image=image,
            prompt=printable(str(file.metadata.get("prompt") or ""))[:LONGEST_PROMPT_SHOWN],
            methods=tuple(dict.fromkeys(config.method for config in file.configs.values())),
            parameters=sum(
                tensor.numel()
                for vectors in (*file.tensors.values(), *(each.tensors for each in file.weights.values()))
                for tensor in vectors.values()
            ),
            size=status.st_size,
            is_control=CONTROL in file.weights,
            problem=problem,
            stamp=stamp,
        )
        return self._known[path]


def _digest(owner: str) -> str:
    return hashlib.sha256(f"adapters of {owner}".encode()).hexdigest()


def _within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())
