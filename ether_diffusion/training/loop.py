"""The training loop: accumulate, clip, step, log. It knows neither models nor data, only an objective."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch import Tensor, nn

from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoints import Checkpoints
from ether_diffusion.training.distributed import LAYOUTS, Layout
from ether_diffusion.training.ema import RunningAverage
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.memory import current_memory, format_bytes, peak_memory, start_measuring
from ether_diffusion.training.optimizers import make_optimizer, make_schedule
from ether_diffusion.training.options import OptimizationOptions
from ether_diffusion.training.state import RunState, random_state, set_random_state
from ether_diffusion.training.stop_signals import Interrupted, StopSignals
from ether_diffusion.training.trackers import PROJECT, init_kwargs

TIMED_STEPS = 5
"""After so many the time that is left is told, by their median: the first one takes longer than the others."""


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


class Trainer:
    """Minimises an objective.

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
        load: called with global sample indices before they come, to read their files.
        validate: called with the number of steps done, on every process, with everything in evaluation mode, the
            running average in place of the last values, and the random generators set back afterwards.
        validate_after: whether to do so after this number of steps.

    Raises:
        InputError: the checkpoint to start from is of other vectors.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        groups: Sequence[dict[str, Any]],
        options: OptimizationOptions,
        *,
        layout: Layout = "replicated",
        checkpoints: Checkpoints | None = None,
        load: Callable[[Sequence[int]], None] = lambda samples: None,
        validate: Callable[[int], None] = lambda step: None,
        validate_after: Callable[[int], bool] = lambda step: False,
    ):
        self.accelerator, self.options, self.checkpoints = accelerator, options, checkpoints
        self.load, self.validate, self.validate_after = load, validate, validate_after
        self.rate_names = [_rate_name(group.get("name", "denoiser")) for group in groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        names = {parameter: name for name, parameter in objective.named_parameters()}
        fused = accelerator.scaler is None and layout != "partitioned"  # DeepSpeed steps on its own parts
        optimizer = make_optimizer(groups, options, fused=fused)
        self.average = RunningAverage(parameters, options.ema_decay) if options.use_ema else None
        self.state = RunState(
            {names[each]: each for each in parameters},
            optimizer,
            # Stepped here, once per optimiser step: Accelerate's own wrapper would step once per process.
            make_schedule(optimizer, options),
            accelerator.scaler,
            self.average,
            divides_optimizer=LAYOUTS[layout].divides_optimizer,
        )
        self.layout = LAYOUTS[layout](accelerator, objective, optimizer, options)
        self.layout.model.train()
        if checkpoints is not None:
            checkpoints.restore(self.state, accelerator)
            self.layout.restored()

    def train(self, tracked: dict[str, Any] | None = None) -> TrainingResult:
        """Take all steps that are left.

        tracked: options to log with the run.

        Raises:
            FloatingPointError: a loss that is not finite; names the step and the last checkpoint. Nothing is saved
                then.
            InputError: data that cannot be read; the steps before were saved, and the message says where.
            Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
            OSError: a checkpoint could not be written.
        """
        accelerator, state = self.accelerator, self.state
        if accelerator.log_with:
            accelerator.init_trackers(PROJECT, config=tracked, init_kwargs=init_kwargs(accelerator.logging_dir))
        start_measuring(accelerator.device)
        started, taken = time.perf_counter() - state.seconds, []
        signals = None if self.checkpoints is None else StopSignals()
        with signals or nullcontext(), tqdm(total=self.options.steps, initial=state.step, desc="training") as bar:
            stopped = 0
            while state.step < self.options.steps and not stopped:
                begun = time.perf_counter()
                with self._saving_before_data_end_it():
                    total = self._accumulate()
                loss, stopped = self._agree(total, signals)
                self._check_finite(loss)
                rates = self._step()
                state.losses.append(loss)
                state.seconds = time.perf_counter() - started
                taken.append(time.perf_counter() - begun)
                self._log(bar, loss, rates, seconds=taken[-1])
                if len(taken) == TIMED_STEPS < self.options.steps:
                    bar.clear()  # the line begins at the left
                    self._tell_time(statistics.median(taken))
                if self.validate_after(state.step):
                    with self._evaluating():
                        self.validate(state.step)
                if self.checkpoints is not None and self.checkpoints.due(state.step):
                    self.checkpoints.save(state, accelerator)
            if not stopped:  # a signal may have come since the last step was agreed upon
                _, stopped = self._agree(torch.zeros((), device=accelerator.device), signals)
            if stopped:
                path = self.checkpoints.save(state, accelerator)
                raise Interrupted(stopped, state.step, self.options.steps, path)
        accelerator.wait_for_everyone()
        self.layout.model.eval()
        if self.average is not None:
            self.average.apply()
        return TrainingResult(state.losses, state.seconds, peak_memory(accelerator.device))

    def _accumulate(self) -> Tensor:
        """Add up the gradients of this process's part of a step, and return its mean loss."""
        parts = self.options.gradient_accumulation_steps
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(parts):
            samples = self._samples(part)
            self._load(samples)
            total += self.layout.accumulate(samples)
        return total / parts

    def _load(self, samples: Sequence[int]) -> None:
        """Read the files of samples; where one process cannot, all raise, so that none waits for another."""
        problem = ""
        try:
            self.load(samples)
        except InputError as error:
            problem = str(error)
        if self.accelerator.num_processes > 1:
            failed = torch.tensor([int(bool(problem))], device=self.accelerator.device)
            if self.accelerator.gather(failed).any():
                problem = next(filter(None, gather_object([problem])))
        if problem:
            raise InputError(problem)

    @contextmanager
    def _saving_before_data_end_it(self) -> Iterator[None]:
        """A context of one step that saves the steps before it where its data cannot be read."""
        found = random_state()
        try:
            yield
        except InputError as error:
            if self.checkpoints is None or not self.state.step:
                raise
            set_random_state(found)  # parts of the step may have drawn from them
            path = self.checkpoints.save(self.state, self.accelerator)
            raise InputError(
                f"{error}; stopped after step {self.state.step} of {self.options.steps}, saved as {path}; repair the "
                "data, then repeat the command with --resume_from_checkpoint latest --resume_with_changed data"
            ) from error

    def _samples(self, part: int) -> list[int]:
        """Global indices of the samples that this process handles in one forward pass of the step."""
        passes = self.state.step * self.options.gradient_accumulation_steps + part
        batch, processes = self.options.train_batch_size, self.accelerator.num_processes
        first = (passes * processes + self.accelerator.process_index) * batch
        return list(range(first, first + batch))

    def _agree(self, loss: Tensor, signals: StopSignals | None) -> tuple[float, int]:
        """The mean of a loss over all processes, and the number of a signal that any of them was sent, else 0.

        One exchange for both: all processes stop after the same step. The device is waited for once in a step, here:
        a loss that is not finite must not be stepped on.
        """
        number = 0 if signals is None else signals.number
        if self.accelerator.num_processes == 1:
            return loss.item(), number
        own = torch.stack([loss, torch.full_like(loss, number)])[None]  # (1, 2)
        losses, numbers = self.accelerator.gather(own).cpu().unbind(dim=1)  # (processes,) each
        return losses.mean().item(), int(numbers.max().item())

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            last = "" if self.checkpoints is None else f"; {self.checkpoints.describe_last()}"
            raise FloatingPointError(
                f"the loss is {loss} at step {self.state.step + 1} of {self.options.steps}; try a lower "
                f"--learning_rate, or --mixed_precision bf16 or no{last}"
            )

    def _step(self) -> list[float]:
        """Step optimiser, schedule and running average; the learning rates of the step."""
        taken = self.layout.step()
        rates = self.state.schedule.get_last_lr()
        self.state.schedule.step()
        if self.average is not None and taken:
            self.average.update()
        return rates

    def _log(self, bar: Any, loss: float, rates: Sequence[float], *, seconds: float) -> None:
        memory = current_memory(self.accelerator.device)
        figures = {"train/loss": loss, **dict(zip(self.rate_names, rates, strict=True))}
        figures |= {"train/seconds_per_step": seconds, "train/memory": memory}
        self.accelerator.log(figures, step=self.state.step)
        shown = {"loss": f"{loss:.4f}", "lr": f"{rates[0]:.2e}", "step": f"{seconds:.2f}s"}
        bar.set_postfix(shown, memory=format_bytes(memory), refresh=False)
        bar.update()

    def _tell_time(self, seconds: float) -> None:
        """Log how long the steps that are left take, by the seconds of one."""
        left = self.options.steps - self.state.step
        narrate("expected time: %s for the %d steps that are left", in_words(left * seconds), left)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Everything as it is for generating; on leaving, as it was."""
        found = random_state()
        self.layout.model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied():
                yield
        finally:
            self.layout.model.train()
            set_random_state(found)


def in_words(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _rate_name(group: str) -> str:
    """What the trackers call the learning rate of a group."""
    return "train/learning_rate" if group == "denoiser" else f"train/{group.replace(' ', '_')}_learning_rate"
