"""One training checkpoint: how it is written, read and verified, and which ones a folder has.

A training checkpoint is a folder `checkpoint-<step>` in the output folder: the trained vectors, the state of
optimiser, schedule, loss scaler and random generators, and a manifest with the options of the run and a SHA-256 of
each file. What is drawn for a sample follows from the seed and its number, so the place in the data is the step. The
frozen model is not in it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ether_diffusion.errors import InputError
from ether_diffusion.files import replace_folder

PREFIX = "checkpoint-"
MANIFEST_NAME, VECTORS_NAME, STATE_NAME = "checkpoint.json", "vectors.safetensors", "state.pt"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A training checkpoint that was read: vectors by name, the state of everything else, the options of its run."""

    path: Path
    step: int
    run: dict[str, Any]
    vectors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(
    folder: Path, *, step: int, run: Mapping[str, Any], vectors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write `checkpoint-<step>` into a folder, completely or not at all, and return its path.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left then.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    contents = {VECTORS_NAME: save(dict(vectors)), STATE_NAME: buffer.getvalue()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "run": dict(run),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents[MANIFEST_NAME] = json.dumps(manifest, indent=1, sort_keys=True).encode()
    final = folder / f"{PREFIX}{step}"
    if reason := why_foreign(final):
        raise FileExistsError(f"something of that name is there, and {reason}")
    replace_folder(final, contents)  # one of that name is damaged: no run starts below a checkpoint that can be read
    return final


def why_foreign(path: Path) -> str | None:
    """Why what has the name of a checkpoint is none of this release's, and so never removed; None where it is one.

    Its weights may be damaged all the same. What is not there is not foreign.
    """
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_dir() or path.is_symlink():
        return "is no folder of its own"
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"has no {MANIFEST_NAME} that can be read ({error})"
    if not isinstance(manifest, dict) or not {"format_version", "step", "run", "sha256"} <= manifest.keys():
        return f"has a {MANIFEST_NAME} of another kind"
    if manifest["format_version"] != FORMAT_VERSION:
        return f"has format version {manifest['format_version']}, and this release writes {FORMAT_VERSION}"
    if path.name != f"{PREFIX}{manifest['step']}":
        return f"is the checkpoint of step {manifest['step']}"
    return None


def check_no_foreign(folder: Path) -> None:
    """Make sure that nothing in a folder has the name of a checkpoint without being one.

    Raises:
        InputError: something has; it is left alone.
    """
    for path in sorted(folder.glob(f"{PREFIX}*")):
        if path.name.removeprefix(PREFIX).isdecimal() and (reason := why_foreign(path)):
            raise InputError(
                f"--output_dir {folder}: holds {path.name}, which {reason}; it is left alone: move it elsewhere, or "
                "take another folder"
            )


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """Read and verify a training checkpoint.

    Raises:
        InputError: no such folder, or a checkpoint that is incomplete or damaged; names the file.
    """
    where = f"--resume_from_checkpoint {path}"
    if not path.is_dir():
        raise InputError(f"{where}: there is no such folder")
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
        version, step, run, digests = (manifest[name] for name in ("format_version", "step", "run", "sha256"))
        if not (isinstance(run, dict) and isinstance(digests, dict) and type(step) is int):
            raise ValueError(f"{MANIFEST_NAME} is none of a checkpoint's")
        contents = {name: (path / name).read_bytes() for name in (VECTORS_NAME, STATE_NAME)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: is no complete training checkpoint ({error})") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{where}: has format version {version}; this release reads {FORMAT_VERSION}")
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != digests.get(name):
            raise InputError(f"{where}: {name} is damaged: its content does not match the SHA-256 in {MANIFEST_NAME}")
    # The rest of the state is read as tensors and plain values only: a checkpoint runs no code.
    state = torch.load(io.BytesIO(contents[STATE_NAME]), map_location="cpu", weights_only=True)
    return TrainingCheckpoint(path, step, run, load(contents[VECTORS_NAME]), state)


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders called `checkpoint-<step>`, by step; whether they can be read is not looked at."""
    found = [(path.name.removeprefix(PREFIX), path) for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdecimal())
