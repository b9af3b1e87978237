"""Stopping and going on: what a checkpoint of a run holds, how it gets on the disk, and which one to go on from.

A checkpoint is a folder `checkpoint-<step>` in the output folder: the trained vectors, the state of optimiser,
schedule, loss scaler and random generators, and a manifest with the options of the run and a SHA-256 of each file.
What is drawn for a sample follows from the seed and its number, so the place in the data is the step. The frozen model
is not in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load, save
from torch import Tensor, nn

from ether_diffusion.errors import InputError
from ether_diffusion.files import replace_folder
from ether_diffusion.training.ema import RunningAverage
from ether_diffusion.training.methods.configs import INDEX_NAME
from ether_diffusion.training.options import StateOptions

logger = logging.getLogger(__name__)

PREFIX, PARTIAL_SUFFIX, LATEST = "checkpoint-", ".tmp", "latest"
MANIFEST_NAME, VECTORS_NAME, STATE_NAME = "checkpoint.json", "vectors.safetensors", "state.pt"
FORMAT_VERSION = 1

STEADY_SCHEDULES = ("constant", "constant_with_warmup")
"""Learning rates that do not depend on the number of steps in all."""

SIZE_FACTOR, OVERHEAD_BYTES = 6, 1 << 20
"""Size of a checkpoint: so many times the vectors (themselves, their average, Prodigy's four states), and a rest."""
SLACK_BYTES = 64 << 20
"""Room for the adapter's file, the images, the card and the logs."""

FINGERPRINTED_SUFFIXES = (".json", ".safetensors", ".bin")
BLOCK_BYTES, BLOCKS = 4096, 64
"""A model's fingerprint reads about so many blocks of each file, and files up to their sum whole."""


class Interrupted(Exception):
    """A signal has ended the run after a whole step and a checkpoint. `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, step: int, steps: int, checkpoint: Path):
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step} of {steps}, saved as {checkpoint}; to go on, "
            "repeat the command with --resume_from_checkpoint latest"
        )


@dataclass
class RunState:
    """Everything that a step changes.

    losses: the mean loss of every step so far. seconds: wall time of the loop so far, over all its parts.
    divides_optimizer: whether each process holds a part of the optimiser's state.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None
    average: RunningAverage | None = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    divides_optimizer: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters, as `load_state_dict` takes it and `torch.load` reads it with weights only."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "losses": list(self.losses),
            "seconds": self.seconds,
        }

    @torch.no_grad()
    def load(self, snapshot: Snapshot, process: int = 0) -> None:
        """Become what was saved.

        process: whose part of the optimiser's state to take, where that is divided.

        Raises:
            InputError: the checkpoint is of other vectors.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in snapshot.vectors.items()}
        if different := sorted(set(shapes.items()) ^ set(saved.items())):
            name = different[0][0]
            raise InputError(
                f"{snapshot.path}: does not fit what is trained: {name} has shape {saved.get(name, 'none')} in it and "
                f"{shapes.get(name, 'none')} here"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot.vectors[name])
        optimizer = snapshot.state["optimizer"]
        self.optimizer.load_state_dict(optimizer[process] if self.divides_optimizer else optimizer)
        self.schedule.load_state_dict(snapshot.state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(snapshot.state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(snapshot.state["average"])
        self.losses, self.seconds = list(snapshot.state["losses"]), snapshot.state["seconds"]


# Random generators ----------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The global random generators of this process, as plain values and tensors."""
    algorithm, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(key.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the global random generators to what `random_state` returned."""
    algorithm, key, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# One checkpoint -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that was read: vectors by name, the state of everything else, and the options of its run."""

    path: Path
    step: int
    run: dict[str, Any]
    vectors: dict[str, Tensor]
    state: dict[str, Any]


def write_snapshot(
    folder: Path, *, step: int, run: Mapping[str, Any], vectors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write `checkpoint-<step>` into a folder, whole or not at all, and return its path.

    It is written under a hidden name, brought to the disk, and renamed; whenever the process or the machine stops,
    there is no checkpoint or all of it.

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
    replace_folder(final, contents)  # one of that name is damaged: no run starts below a checkpoint that can be read
    return final


def read_snapshot(path: Path) -> Snapshot:
    """Read and verify a checkpoint.

    Raises:
        InputError: no such folder, or a checkpoint that is not whole; names the file.
    """
    if not path.is_dir():
        raise InputError(f"--resume_from_checkpoint {path}: there is no such folder")
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
        version, step, run, digests = (manifest[name] for name in ("format_version", "step", "run", "sha256"))
        contents = {name: (path / name).read_bytes() for name in (VECTORS_NAME, STATE_NAME)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume_from_checkpoint {path}: is no whole checkpoint ({error})") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"--resume_from_checkpoint {path}: has format version {version}; this release reads {FORMAT_VERSION}"
        )
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != digests.get(name):
            raise InputError(
                f"--resume_from_checkpoint {path}: {name} is damaged: its content does not match the SHA-256 in "
                f"{MANIFEST_NAME}"
            )
    # The rest of the state is read as tensors and plain values only: a checkpoint runs no code.
    state = torch.load(io.BytesIO(contents[STATE_NAME]), map_location="cpu", weights_only=True)
    return Snapshot(path, step, run, load(contents[VECTORS_NAME]), state)


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the folders called `checkpoint-<step>`, by step; whether they are whole is not looked at."""
    found = [(path.name.removeprefix(PREFIX), path) for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def _whole_checkpoints(folder: Path) -> Iterator[Snapshot]:
    """The checkpoints that can be read, the latest first; the others are named in the log."""
    for _, path in reversed(find_checkpoints(folder)):
        try:
            yield read_snapshot(path)
        except InputError as error:
            logger.warning("left out: %s", error)


# What a run depends on -----------------------------------------------------------------------------------------


def with_fingerprint(name: str, path: str | Path) -> str:
    """The name of a model with a fingerprint of what lies at the path; the name alone where that is no local folder.

    Configs and weights count with their sizes and, of large ones, blocks evenly spread: a model that was replaced
    shows, and gigabytes need not be read. Folders that are none of a pipeline's components do not count: they may be
    where the run itself writes.
    """
    folder = Path(path)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    index = folder / INDEX_NAME
    components = json.loads(index.read_bytes()) if index.is_file() else {}
    files = [*folder.iterdir(), *(file for component in components for file in (folder / component).rglob("*"))]
    for file in sorted(each for each in files if each.suffix in FINGERPRINTED_SUFFIXES and each.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as opened:
            for place in range(0, size, max(BLOCK_BYTES, size // BLOCKS)):
                opened.seek(place)
                digest.update(opened.read(BLOCK_BYTES))
    return f"{name} (sha256:{digest.hexdigest()[:16]})"


# The checkpoints of a run ---------------------------------------------------------------------------------------


def check_same_run(snapshot: Snapshot, run: Mapping[str, Any], *, later: Sequence[str] = ()) -> None:
    """Make sure that going on gives what the first run would have given.

    `max_train_steps` may grow where the learning rate does not depend on it.

    Args:
        snapshot: the checkpoint to go on from.
        run: name of the option -> value, of the run that wants to.
        later: names whose values are not known yet.

    Raises:
        InputError: an option that has changed; names it, and its value then and now.
    """
    for name in dict.fromkeys([*run, *snapshot.run]):
        if name in later:
            continue
        then, now = snapshot.run.get(name, "not there"), run.get(name, "not there")
        if then == now:
            continue
        if name == "max_train_steps" and now > then and run["lr_scheduler"] in STEADY_SCHEDULES:
            continue
        advice = "the result would be another; repeat the first value, or start anew in another --output_dir"
        if name == "max_train_steps":
            advice = f"it may only grow, and only with --lr_scheduler {' or '.join(STEADY_SCHEDULES)}"
        raise InputError(f"--{name}: was {then!r} in {snapshot.path} and is {now!r} now; {advice}")


class Checkpoints:
    """The checkpoints of one run: where it starts, and how it saves.

    Args:
        folder: the output folder; made when there is something to write.
        options: how often, how many, and what to go on from.
        run: name of the option -> value, for all that the result depends on; `max_train_steps` and `lr_scheduler`
            are among them.
        later: names that `bind` will add to them.

    Attributes:
        start: the checkpoint to go on from, verified; None at the beginning.
        last: path of the newest checkpoint of this run, None if there is none.

    Raises:
        InputError: nothing to go on from under this name, a checkpoint that is not whole, options that have changed,
            or a folder with checkpoints that this run would get into conflict with.
    """

    def __init__(self, folder: Path, options: StateOptions, run: Mapping[str, Any], *, later: Sequence[str] = ()):
        self.folder, self.options, self.run, self.later = folder, options, dict(run), later
        self.start = self._find_start()
        self.last = None if self.start is None else self.start.path

    def _find_start(self) -> Snapshot | None:
        latest = next(_whole_checkpoints(self.folder), None)
        start = latest
        if self.options.resume_from_checkpoint != LATEST:
            given = self.options.resume_from_checkpoint
            start = None if given is None else read_snapshot(self._locate(given))
        if latest is not None and (start is None or latest.step > start.step):
            raise InputError(
                f"--output_dir {self.folder}: holds {latest.path.name} of an earlier run; go on with "
                "--resume_from_checkpoint latest, or remove it, or take another folder"
            )
        if start is not None:
            check_same_run(start, self.run, later=self.later)
        return start

    def _locate(self, given: str) -> Path:
        """A path, or the name of a checkpoint in the output folder, as diffusers' scripts take it."""
        path, named = Path(given), self.folder / given
        return named if named.is_dir() and not path.exists() else path

    def bind(self, name: str, value: str) -> None:
        """Add something to what the result depends on, once it is known.

        Raises:
            InputError: it differs from what it was in the checkpoint to start from.
        """
        self.run[name] = value
        if self.start is not None:
            check_same_run(self.start, {**self.start.run, name: value})

    def check_space(self, parameters: int) -> None:
        """Make sure that the disk has room for the checkpoints still to come and for what the run leaves.

        parameters: the number of float32 values that are trained.

        Raises:
            InputError: it has not; says how many bytes are there, and needed.
        """
        begun = 0 if self.start is None else self.start.step
        # One more than is kept: the oldest goes when the newest is complete, and a signal adds one.
        count = (self.run["max_train_steps"] - begun) // self.options.checkpointing_steps + 1
        if self.options.checkpoints_total_limit is not None:
            count = min(count, self.options.checkpoints_total_limit + 1)
        needed = (4 * parameters * SIZE_FACTOR + OVERHEAD_BYTES) * count + SLACK_BYTES
        existing = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise InputError(
                f"--output_dir {self.folder}: {free / 1e6:.0f} MB are free, but {count} checkpoints and the adapter "
                f"need up to {needed / 1e6:.0f} MB; make room, or set --checkpoints_total_limit"
            )

    def restore(self, state: RunState, accelerator: Accelerator) -> None:
        """Bring a run and the random generators of this process to where it starts.

        Raises:
            InputError: the checkpoint is of other vectors.
        """
        if self.start is not None:
            state.load(self.start, accelerator.process_index)
            set_random_state(self.start.state["random"][accelerator.process_index])

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after so many steps."""
        return step % self.options.checkpointing_steps == 0

    def save(self, state: RunState, accelerator: Accelerator) -> Path:
        """Save a checkpoint, then remove the oldest beyond the limit. Called by every process; the first one writes.

        A step that is saved already is not saved again.

        Raises:
            FloatingPointError: vectors that are not finite; nothing is saved.
            OSError: the disk is full, or the folder cannot be written; names the last checkpoint.
        """
        path = self.folder / f"{PREFIX}{state.step}"
        if path == self.last:
            return path
        vectors = {name: parameter.detach().cpu().contiguous() for name, parameter in state.parameters.items()}
        for name, vector in vectors.items():
            if not torch.isfinite(vector).all():
                raise FloatingPointError(f"{name} is not finite after step {state.step}; {self.describe_last()}")
        generators = gather_object([random_state()])  # one per process
        content = {**state.state_dict(), "random": generators}
        if state.divides_optimizer:
            content["optimizer"] = _gather_on_cpu(content["optimizer"], accelerator)
        if accelerator.is_main_process:
            self._remove_partial()
            try:
                write_snapshot(self.folder, step=state.step, run=self.run, vectors=vectors, state=content)
            except OSError as error:
                raise OSError(f"{path}: could not be saved ({error}); {self.describe_last()}") from error
            self._remove_oldest(state.step)
        accelerator.wait_for_everyone()
        self.last = path
        return path

    def describe_last(self) -> str:
        """The end of an error message: where the run can go on."""
        if self.last is None:
            return "no checkpoint has been saved"
        return f"the last good checkpoint is {self.last}"

    def _remove_partial(self) -> None:
        """Remove what killed saves left; only one process of one run writes here."""
        for left in self.folder.glob(f".{PREFIX}*{PARTIAL_SUFFIX}"):
            shutil.rmtree(left, ignore_errors=True)

    def _remove_oldest(self, newest: int) -> None:
        """Keep the checkpoint of step `newest` and as many before it as the limit allows."""
        if self.options.checkpoints_total_limit is None:
            return
        older = [path for step, path in reversed(find_checkpoints(self.folder)) if step < newest]
        for path in older[self.options.checkpoints_total_limit - 1 :]:
            # Renamed first: a kill while its files go leaves no half checkpoint under the name.
            doomed = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _gather_on_cpu(part: Any, accelerator: Accelerator) -> list[Any] | None:
    """What every process has, in the memory of the main process; None on the others.

    Accelerate's own gathering would bring all of it to every device.
    """
    parts: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    group = dist.new_group(backend="gloo")
    dist.gather_object(_on_cpu(part), parts, group=group)
    dist.destroy_process_group(group)
    return parts


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one does what it did before.

    On leaving, the handlers are those that were found. Outside the main thread Python takes no handlers, and nothing
    is noted.

    Attributes:
        number: of the signal that came, 0 before.
    """

    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._found: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._found = {each: signal.signal(each, self._note) for each in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._found.items():
            signal.signal(each, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
