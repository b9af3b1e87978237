"""The training checkpoints of a run: which one it goes on from, when it saves one, and how many are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from diffusers import DiffusionPipeline

from ether_diffusion.errors import InputError
from ether_diffusion.files import PARTIAL_SUFFIX, nearest_existing
from ether_diffusion.training.checkpoint_files import (
    PREFIX,
    TrainingCheckpoint,
    check_no_foreign,
    find_checkpoints,
    read_checkpoint,
    why_foreign,
    write_checkpoint,
)
from ether_diffusion.training.dependence import UNSET, dependence
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.options import StateOptions
from ether_diffusion.training.options.run import DATA_FLAGS
from ether_diffusion.training.state import RunState, random_state, set_random_state

logger = logging.getLogger(__name__)

LATEST = "latest"

STEADY_SCHEDULES = ("constant", "constant_with_warmup")
"""Learning rates that do not depend on the number of steps in all."""

SIZE_FACTOR, OVERHEAD_BYTES = 6, 1 << 20
"""Size of a checkpoint: so many times the vectors (themselves, their average, Prodigy's four states), and a rest."""
SLACK_BYTES = 64 << 20
"""Room for the adapter's file, the images, the card and the logs."""

FINGERPRINTED_SUFFIXES = (".json", ".safetensors", ".bin")
BLOCK_BYTES, BLOCKS = 4096, 64
"""A model's fingerprint reads about so many blocks of each file, and all of a file up to their sum."""


def with_fingerprint(name: str, path: str | Path) -> str:
    """The name of a model with a fingerprint of what lies at the path; the name alone where there is nothing local.

    Configs and weights count with their sizes and, of large ones, blocks evenly spread: a model that was replaced
    shows, and gigabytes need not be read. Folders that are none of a pipeline's components do not count: they may be
    where the run itself writes.
    """
    folder = Path(path)
    if not folder.exists():
        return name
    digest = hashlib.sha256()
    index = folder / DiffusionPipeline.config_name
    components = json.loads(index.read_bytes()) if index.is_file() else {}
    files = [folder] if folder.is_file() else list(folder.iterdir())
    files += [file for component in components for file in (folder / component).rglob("*")]
    for file in sorted(each for each in files if each.suffix in FINGERPRINTED_SUFFIXES and each.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(BLOCK_BYTES, size // BLOCKS)):
                opened.seek(start)
                digest.update(opened.read(BLOCK_BYTES))
    return f"{name} (sha256:{digest.hexdigest()[:16]})"


def check_same_run(
    checkpoint: TrainingCheckpoint,
    run: Mapping[str, Any],
    *,
    later: Sequence[str] = (),
    may_differ: Collection[str] = (),
) -> None:
    """Make sure that going on gives what the first run would have given.

    `max_train_steps` may grow where the learning rate does not depend on it.

    Args:
        run: name of the option -> value, of the run that wants to go on.
        later: names whose values are not known yet.
        may_differ: names of flags whose data may be others now; where they are, the log says so.

    Raises:
        InputError: an option that has changed; names it, and its value then and now.
    """
    before, after = dependence(checkpoint.run), dependence(run)
    for name in dict.fromkeys([*run, *checkpoint.run]):
        if name in later or before.get(name) == after.get(name):
            continue
        if name in may_differ:
            narrate("--%s: other data than in %s, as --resume_with_changed says", name, checkpoint.path)
            continue
        then, now = checkpoint.run.get(name, UNSET), run.get(name, UNSET)
        if name == "max_train_steps" and type(then) is int and now > then and run["lr_scheduler"] in STEADY_SCHEDULES:
            continue
        advice = "the result would be another; repeat the first value, or start anew in another --output_dir"
        if name == "max_train_steps":
            advice = f"it may only grow, and only with --lr_scheduler {' or '.join(STEADY_SCHEDULES)}"
        if name in DATA_FLAGS:
            advice = (
                "the result would be another; where repaired or added data are meant, add --resume_with_changed data; "
                "else take the first data, or start anew in another --output_dir"
            )
        raise InputError(f"--{name}: was {then!r} in {checkpoint.path} and is {now!r} now; {advice}")


class Checkpoints:
    """The training checkpoints of one run: where it starts, and how it saves.

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
        InputError: nothing to go on from under this name, a checkpoint that is damaged, options that have changed, or
            a folder with checkpoints that this run would get into conflict with, its own kind's or others'.
    """

    def __init__(self, folder: Path, options: StateOptions, run: Mapping[str, Any], *, later: Sequence[str] = ()):
        self.folder, self.options, self.run, self.later = folder, options, dict(run), later
        check_no_foreign(folder)
        self.start = self._find_start()
        self.last = None if self.start is None else self.start.path

    def _find_start(self) -> TrainingCheckpoint | None:
        start = latest = next(self._readable(), None)
        given = self.options.resume_from_checkpoint
        if given is None:
            start = None
        elif given != LATEST:
            # A path, or the name of a checkpoint in the output folder, as diffusers' scripts take it.
            path, named = Path(given), self.folder / given
            start = read_checkpoint(named if named.is_dir() and not path.exists() else path)
        is_behind = latest is not None and (start is None or latest.step > start.step)
        if is_behind and not self.options.overwrite_output_dir:
            raise InputError(
                f"--output_dir {self.folder}: holds {latest.path.name} of an earlier run; go on with "
                "--resume_from_checkpoint latest, or give --overwrite_output_dir, or take another folder"
            )
        if start is not None:
            check_same_run(start, self.run, later=self.later, may_differ=self.options.may_differ)
        return start

    def _readable(self) -> Iterator[TrainingCheckpoint]:
        """The checkpoints that can be read, the latest first; the others are named in the log."""
        for _, path in reversed(find_checkpoints(self.folder)):
            try:
                yield read_checkpoint(path)
            except InputError as error:
                logger.warning("left out: %s", error)

    def bind(self, name: str, value: str) -> None:
        """Add something to what the result depends on, once it is known.

        Raises:
            InputError: it differs from what it was in the checkpoint to start from.
        """
        self.run[name] = value
        if self.start is not None:
            check_same_run(self.start, {**self.start.run, name: value}, may_differ=self.options.may_differ)

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
        free = shutil.disk_usage(nearest_existing(self.folder)).free
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

    @property
    def goes_on(self) -> bool:
        """Whether the run starts from a checkpoint of the run whose output folder this is."""
        return self.start is not None and self.start.path.resolve().parent == self.folder.resolve()

    def remove_others(self) -> None:
        """Remove the checkpoints of an earlier run that --overwrite_output_dir gives up. For one process."""
        begun = self.start.step if self.goes_on else -1
        for step, path in find_checkpoints(self.folder):
            if self.options.overwrite_output_dir and step > begun:
                _remove(path)

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
        content = {**state.state_dict(), "random": gather_object([random_state()])}  # one per process
        if state.divides_optimizer:
            content["optimizer"] = _gather_on_cpu(content["optimizer"], accelerator)
        if accelerator.is_main_process:
            self._remove_partial()
            try:
                write_checkpoint(self.folder, step=state.step, run=self.run, vectors=vectors, state=content)
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
        """Remove what killed saves left, however young: only one process of one run writes here."""
        for left in self.folder.glob(f".{PREFIX}*{PARTIAL_SUFFIX}"):
            shutil.rmtree(left, ignore_errors=True)

    def _remove_oldest(self, newest: int) -> None:
        """Keep the checkpoint of step `newest` and as many before it as the limit allows."""
        if self.options.checkpoints_total_limit is None:
            return
        found = reversed(find_checkpoints(self.folder))
        older = [path for step, path in found if step < newest and not why_foreign(path)]
        for path in older[self.options.checkpoints_total_limit - 1 :]:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, unless it is foreign."""
    if why_foreign(checkpoint) is None:
        # Renamed first: a kill while its files go leaves no half checkpoint under the name.
        doomed = checkpoint.with_name(f".{checkpoint.name}{PARTIAL_SUFFIX}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def _gather_on_cpu(part: Any, accelerator: Accelerator) -> list[Any] | None:
    """What every process has, in the memory of the main process; None on the others.

    Accelerate's own gathering would bring all of it to every device.
    """
    parts: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    group = dist.new_group(backend="gloo")
    dist.gather_object(send_to_device(part, "cpu"), parts, group=group)
    dist.destroy_process_group(group)
    return parts
