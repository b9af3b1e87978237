"""The accelerator of a run: its devices, processes, precision and trackers, and what one process does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.errors import InputError
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.options import OptimizationOptions, PerformanceOptions, RunOptions
from ether_diffusion.training.trackers import check_trackers, tracker_names

COLLECTIVE_TIMEOUT = timedelta(hours=2)

UNSUPPORTED = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config"}
"""Variables of `accelerate launch` for what divides a training in ways that this one does not have."""

Answer = TypeVar("Answer")


def tell_overruled(performance: PerformanceOptions, optimization: OptimizationOptions) -> None:
    """Say of each setting of Accelerate that a flag overrules it, where the two are not the same.

    Accelerate takes these from variables, which `accelerate launch` sets from its own flags and configuration file.
    """
    flags = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "1", optimization),
        "ACCELERATE_GRADIENT_CLIPPING": ("max_grad_norm", "none", optimization),
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", performance),
        "ACCELERATE_DYNAMO_BACKEND": ("compile", "no", performance),
    }
    for variable, (flag, unset, options) in flags.items():
        setting, value = os.environ.get(variable, unset).lower(), getattr(options, flag)
        if setting in (unset, "", "auto", "none", str(value).lower()) or value is None:
            continue
        try:
            if float(setting) == value:
                continue
        except ValueError:
            pass
        name = variable.removeprefix("ACCELERATE_").lower()
        narrate(
            "%s %s: from Accelerate's configuration, is overruled by --%s, which is %s", name, setting, flag, value
        )


def make_accelerator(
    run: RunOptions, performance: PerformanceOptions, optimization: OptimizationOptions
) -> Accelerator:
    """Devices, processes, precision and trackers.

    What the flags say holds: Accelerate is told of it outright, so that it asks no variable. Only without
    --mixed_precision is the precision that of the launcher.

    Args:
        run: output folder and trackers.
        performance: precision.
        optimization: forward passes per optimiser step.

    Raises:
        InputError: a precision that this machine does not have, a tracker that is not installed, or a way to divide
            the training that it does not have.
    """
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise InputError(
                f"{name}: comes from Accelerate's configuration, and this training has none; drop it there"
            )
    check_trackers(run.report_to)
    tell_overruled(performance, optimization)
    logging_dir = Path(run.output_dir, run.logging_dir)  # an absolute logging_dir takes the place of both
    try:
        accelerator = Accelerator(
            mixed_precision=performance.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(optimization.gradient_accumulation_steps),
            dynamo_plugin=TorchDynamoPlugin("no", "default", False, False, use_regional_compilation=False),
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
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        narrate("--mixed_precision fp16: is about ten times slower on a CPU than no; take no or bf16 there")
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
