"""The adapters on offer: what lies in one folder, each with its image and what its file says."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.errors import InputError, printable

IMAGE_NAME = "image.png"
IMAGE_NAMES = (IMAGE_NAME, "picture.png", "grid.png")  # picture.png is what version 0.1 wrote
NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,39}")
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
    """A name for a folder, from what a user typed: letters, digits, - and _.

    Raises:
        InputError: nothing is left of it.
    """
    name = re.sub(r"[^0-9A-Za-z_-]+", "-", text.strip()).strip("-_")[:40]
    if not NAME.fullmatch(name):
        raise InputError(f"Name: got {printable(text[:80])!r}, needs letters or digits, such as my-dog")
    return name


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

    def add(self, name: str, folder: Path) -> str:
        """Take a trained adapter in; the name that it gets, numbered where it is taken."""
        with self._lock:
            taken = {self._name(path) for each in self.folders for path in self._files(each)}
            numbered = (name, *(f"{name}-{k}" for k in range(2, 10_000)))
            free = next(each for each in numbered if each not in taken and not (self.folders[-1] / each).exists())
            target = self.folders[-1] / free
            partial = self.folders[-1] / f".{free}"
            partial.mkdir()
            shutil.copy(folder / WEIGHTS_NAME, partial)
            partial.rename(target)
            return free

    def _files(self, folder: Path) -> list[Path]:
        candidates = [*folder.glob("*.safetensors"), *folder.glob(f"*/{WEIGHTS_NAME}")]
        return [
            path
            for path in sorted(candidates)
            if NAME.fullmatch(self._name(path)) and path.is_file() and _within(path, folder)
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


def _within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())
