"""The accelerator of a run: its devices, processes, precision and trackers, and what one process does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.errors import InputError
from ether_diffusion.training.options import PerformanceOptions, RunOptions
from ether_diffusion.training.trackers import check_trackers, tracker_names

COLLECTIVE_TIMEOUT = timedelta(hours=2)

Answer = TypeVar("Answer")


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
    if accelerator.mixed_precision not in PRECISIONS:
        raise InputError(
            f"mixed precision {accelerator.mixed_precision}: came from `accelerate launch`, needs one of "
            f"{', '.join(PRECISIONS)}"
        )
    if performance.allow_tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # convolutions have it already
    return accelerator


def on_main_process(accelerator: Accelerator, call: Callable[[], Answer]) -> Answer:
    """What a call returns, on every process, where the main one alone makes it.

    Raises:
        InputError: it raised one; the same on every process, so that none waits for another.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = call()
        except InputError as error:
            answer[1] = str(error)
    value, problem = broadcast_object_list(answer)
    if problem is not None:
        raise InputError(problem)
    return value
