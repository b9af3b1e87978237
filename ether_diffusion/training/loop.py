"""The training loop: accumulate, clip, step, log. It knows neither models nor data, only an objective."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from tqdm.auto import tqdm

from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoints import (
    Checkpoints,
    Interrupted,
    RunState,
    StopSignals,
    random_state,
    set_random_state,
)
from ether_diffusion.training.distributed import LAYOUTS, Layout
from ether_diffusion.training.ema import RunningAverage
from ether_diffusion.training.memory import current_memory, format_bytes, peak_memory, start_measuring
from ether_diffusion.training.optimizers import make_optimizer, make_schedule
from ether_diffusion.training.options import OptimizationOptions, PerformanceOptions, RunOptions
from ether_diffusion.training.trackers import PROJECT, check_trackers, init_kwargs, tracker_names

COLLECTIVE_TIMEOUT = timedelta(hours=2)
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingResult:
    """What a run has come to; it counts from the first step, before any stop.

    losses: the mean loss of every optimiser step, over all processes.
    seconds: wall time of the loop.
    peak_memory: bytes that this process used at most, since it started or went on.
    """

    losses: list[float]
    seconds: float
    peak_memory: int = 0


def check_output_dir(folder: str | Path) -> Path:
    """Make sure that the output folder can be written to, or made; nothing is left behind.

    Raises:
        InputError: it cannot.
    """
    folder = Path(folder)
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return folder
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written to ({error})") from error


def make_accelerator(run: RunOptions, performance: PerformanceOptions, accumulation: int) -> Accelerator:
    """Devices, processes, precision and trackers.

    Args:
        run: output folder and trackers.
        performance: precision.
        accumulation: forward passes per optimiser step.

    Raises:
        InputError: a precision that this machine does not have, or a tracker that is not installed.
    """
    check_trackers(run.report_to)
    logging_dir = Path(run.output_dir, run.logging_dir)  # an absolute logging_dir takes the place of both
    try:
        accelerator = Accelerator(
            mixed_precision=performance.mixed_precision,
            gradient_accumulation_steps=accumulation,
            log_with=tracker_names(run.report_to) or None,
            project_dir=str(logging_dir),
            # The others wait in a collective while the first process generates.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as error:
        precision = performance.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        raise InputError(f"--mixed_precision {precision}: not on this machine ({error})") from error
    if accelerator.mixed_precision not in WEIGHT_DTYPES:
        raise InputError(
            f"mixed precision {accelerator.mixed_precision}: came from `accelerate launch`, needs one of "
            f"{', '.join(WEIGHT_DTYPES)}"
        )
    if performance.allow_tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # convolutions have it already
    return accelerator


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    groups: Sequence[dict[str, Any]],
    options: OptimizationOptions,
    *,
    layout: Layout = "replicated",
    checkpoints: Checkpoints | None = None,
    tracked: dict[str, Any] | None = None,
    validate: Callable[[int], None] | None = None,
    validate_after: Callable[[int], bool] = lambda step: False,
) -> TrainingResult:
    """Minimise an objective.

    Step s covers the global samples [s·G, (s+1)·G), G = accumulation steps × processes × batch size, so a run on two
    processes sees the same samples as one with a batch twice as large.

    Args:
        accelerator: prepared here for objective and optimiser.
        objective: maps global sample indices to a loss for each, (b,).
        groups: what is trained, as optimisers take parameters: dictionaries with "params" and "lr", and a "name" to
            log the rate under where it is not the denoiser's.
        options: steps, batch, schedule, optimiser; resolved.
        layout: of the processes; "sharded" needs a denoiser that is.
        checkpoints: where to start and what to save; without them the run starts at the beginning, saves nothing and
            leaves signals alone.
        tracked: options to log with the run.
        validate: called with the number of steps done, on every process, with everything in evaluation mode, the
            running average in place of the last values, and the random generators set back afterwards.
        validate_after: whether to do so after this number of steps.

    Raises:
        FloatingPointError: a loss that is not finite; names the step and the last checkpoint. Nothing is saved then.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
        InputError: the checkpoint to start from is of other vectors.
        OSError: a checkpoint could not be written.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups, options)
    # Stepped here, once per optimiser step: Accelerate's own wrapper would step once per process.
    schedule = make_schedule(optimizer, options)
    average = RunningAverage(parameters, options.ema_decay) if options.use_ema else None
    names = {parameter: name for name, parameter in objective.named_parameters()}
    rate_names = [_rate_name(group.get("name", "denoiser")) for group in groups]
    state = RunState({names[each]: each for each in parameters}, optimizer, schedule, accelerator.scaler, average)
    spread = LAYOUTS[layout](accelerator, objective, optimizer, options)
    state.divides_optimizer = spread.divides_optimizer
    spread.model.train()
    if checkpoints is not None:
        checkpoints.restore(state, accelerator)
        spread.restored()
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config=tracked, init_kwargs=init_kwargs(accelerator.logging_dir))
    start_measuring(accelerator.device)
    started = time.perf_counter() - state.seconds
    with (
        StopSignals() if checkpoints is not None else nullcontext() as signals,
        tqdm(
            total=options.steps,
            initial=state.step,
            desc="training",
            disable=not accelerator.is_local_main_process,
        ) as bar,
    ):
        for step in range(state.step, options.steps):
            begun = time.perf_counter()
            total = torch.zeros((), device=accelerator.device)
            for part in range(options.gradient_accumulation_steps):
                total += spread.accumulate(_samples(accelerator, options, step, part))
            mean, stopped = _agree(accelerator, total / options.gradient_accumulation_steps, signals)
            if not math.isfinite(mean):
                last = "" if checkpoints is None else f"; {checkpoints.describe_last()}"
                raise FloatingPointError(
                    f"the loss is {mean} at step {step + 1} of {options.steps}; try a lower "
                    f"--learning_rate, or --mixed_precision bf16 or no{last}"
                )
            taken = spread.step()
            rates = schedule.get_last_lr()
            schedule.step()
            if average is not None and taken:
                average.update()
            state.losses.append(mean)
            state.seconds = time.perf_counter() - started
            figures = {"train/loss": mean, **dict(zip(rate_names, rates, strict=True))}
            figures["train/seconds_per_step"] = time.perf_counter() - begun
            figures["train/memory"] = current_memory(accelerator.device)
            accelerator.log(figures, step=step + 1)
            bar.set_postfix(
                loss=f"{mean:.4f}",
                lr=f"{rates[0]:.2e}",
                step=f"{figures['train/seconds_per_step']:.2f}s",
                memory=format_bytes(figures["train/memory"]),
                refresh=False,
            )
            bar.update()
            if validate is not None and validate_after(step + 1):
                with _set_aside(spread.model, average):
                    validate(step + 1)
            if checkpoints is not None and checkpoints.due(state.step):
                checkpoints.save(state, accelerator)
            if stopped:
                break
        else:  # a signal may have come since the last step was agreed upon
            _, stopped = _agree(accelerator, torch.zeros((), device=accelerator.device), signals)
        if checkpoints is not None and stopped:
            path = checkpoints.save(state, accelerator)
            raise Interrupted(stopped, state.step, options.steps, path)
    accelerator.wait_for_everyone()
    spread.objective().eval()
    if average is not None:
        average.apply()
    return TrainingResult(state.losses, state.seconds, peak_memory(accelerator.device))


def _rate_name(group: str) -> str:
    """What the trackers call the learning rate of a group."""
    return "train/learning_rate" if group == "denoiser" else f"train/{group.replace(' ', '_')}_learning_rate"


@contextmanager
def _set_aside(wrapped: nn.Module, average: RunningAverage | None) -> Iterator[None]:
    """Everything as it is for generating; on leaving, as it was."""
    found = random_state()
    wrapped.eval()
    try:
        with nullcontext() if average is None else average.applied():
            yield
    finally:
        wrapped.train()
        set_random_state(found)


def _agree(accelerator: Accelerator, loss: torch.Tensor, signals: StopSignals | None) -> tuple[float, int]:
    """The mean of a loss over all processes, and the number of a signal that any of them was sent, else 0.

    One exchange for both: all processes stop after the same step.
    """
    number = 0 if signals is None else signals.number
    own = torch.stack([loss, torch.full_like(loss, number)])[None]  # (1, 2)
    losses, numbers = accelerator.gather(own).unbind(dim=1)  # (processes,) each
    return losses.mean().item(), int(numbers.max().item())


def _samples(accelerator: Accelerator, options: OptimizationOptions, step: int, part: int) -> list[int]:
    """Global indices of the samples that this process handles in one forward pass."""
    passes = step * options.gradient_accumulation_steps + part
    first = (passes * accelerator.num_processes + accelerator.process_index) * options.train_batch_size
    return list(range(first, first + options.train_batch_size))
