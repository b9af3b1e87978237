"""The training loop: accumulate, clip, step, log. It knows neither models nor data, only an objective."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from ether_diffusion.training.options import InputError, OptimizationOptions, RunOptions
from ether_diffusion.training.state import Checkpoints, Interrupted, RunState, StopSignals

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingResult:
    """losses: the mean loss of every optimiser step, over all processes. seconds: wall time of the loop.

    Both count from the first step, before any stop.
    """

    losses: list[float]
    seconds: float


def check_output_dir(folder: str | Path) -> Path:
    """Create the output folder and make sure that it can be written to.

    Raises:
        InputError: it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written to ({error})") from error


def make_accelerator(run: RunOptions, optimization: OptimizationOptions) -> Accelerator:
    """Devices, processes, precision and trackers.

    Raises:
        InputError: a precision that this machine does not have, or a tracker that is not installed.
    """
    if run.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--report_to tensorboard: the package is missing; pip install tensorboard")
    logging_dir = Path(run.output_dir, run.logging_dir)  # an absolute logging_dir takes the place of both
    try:
        return Accelerator(
            mixed_precision=run.mixed_precision,
            gradient_accumulation_steps=optimization.gradient_accumulation_steps,
            log_with=None if run.report_to == "none" else run.report_to,
            project_dir=str(logging_dir),
        )
    except ValueError as error:
        precision = run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        raise InputError(f"--mixed_precision {precision}: not on this machine ({error})") from error


def train(
    accelerator: Accelerator,
    objective: nn.Module,
    parameters: Sequence[nn.Parameter],
    options: OptimizationOptions,
    *,
    learning_rate: float,
    checkpoints: Checkpoints | None = None,
    tracked: dict[str, Any] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Minimise an objective with AdamW.

    Step s covers the global samples [s·G, (s+1)·G), G = accumulation steps × processes × batch size, so a run on two
    processes sees the same samples as one with a batch twice as large.

    Args:
        accelerator: prepared here for objective and optimiser.
        objective: maps global sample indices to a loss for each, (b,).
        parameters: what is trained.
        options: steps, batch, schedule, AdamW.
        learning_rate: of the schedule's plateau.
        checkpoints: where to start and what to save; without them the run starts at the beginning, saves nothing and
            leaves signals alone.
        tracked: options to log with the run.
        after_step: called with the number of steps done, after each, on every process.

    Raises:
        FloatingPointError: a loss that is not finite; names the step and the last checkpoint. Nothing is saved then.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
        InputError: the checkpoint to start from is of other vectors.
        OSError: a checkpoint could not be written.
    """
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=options.adam_weight_decay, eps=options.adam_epsilon
    )
    # Stepped here, once per optimiser step: Accelerate's own wrapper would step once per process.
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    names = {parameter: name for name, parameter in objective.named_parameters()}
    state = RunState({names[each]: each for each in parameters}, optimizer, schedule, accelerator.scaler)
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    wrapped.train()
    if checkpoints is not None:
        checkpoints.restore(state, accelerator)
    accelerator.init_trackers("ether", config=tracked)
    started = time.perf_counter() - state.seconds
    with (
        StopSignals() if checkpoints is not None else nullcontext() as signals,
        tqdm(
            total=options.max_train_steps,
            initial=state.step,
            desc="training",
            disable=not accelerator.is_local_main_process,
        ) as bar,
    ):
        for step in range(state.step, options.max_train_steps):
            total = torch.zeros((), device=accelerator.device)
            for part in range(options.gradient_accumulation_steps):
                samples = _samples(accelerator, options, step, part)
                with accelerator.accumulate(wrapped):
                    loss = wrapped(samples).mean()
                    accelerator.backward(loss)
                total += loss.detach()
            mean, stopped = _agree(accelerator, total / options.gradient_accumulation_steps, signals)
            if not math.isfinite(mean):
                last = "" if checkpoints is None else f"; {checkpoints.describe_last()}"
                raise FloatingPointError(
                    f"the loss is {mean} at step {step + 1} of {options.max_train_steps}; try a lower "
                    f"--learning_rate, or --mixed_precision bf16 or no{last}"
                )
            accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
            prepared.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            prepared.zero_grad()
            state.losses.append(mean)
            state.seconds = time.perf_counter() - started
            accelerator.log({"train/loss": mean, "train/learning_rate": rate}, step=step + 1)
            bar.update()
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.2e}")
            if after_step is not None:
                after_step(step + 1)
            if checkpoints is not None and checkpoints.due(state.step):
                checkpoints.save(state, accelerator)
            if stopped:
                break
        else:  # a signal may have come since the last step was agreed upon
            _, stopped = _agree(accelerator, torch.zeros((), device=accelerator.device), signals)
        if checkpoints is not None and stopped:
            path = checkpoints.save(state, accelerator)
            raise Interrupted(stopped, state.step, options.max_train_steps, path)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()
    return TrainingResult(state.losses, state.seconds)


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
