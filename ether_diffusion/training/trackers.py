"""Where a run is logged: TensorBoard and Weights & Biases, both through Accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from ether_diffusion.errors import InputError

PROJECT = "ether-diffusion"
"""Name of the project on Weights & Biases, and of TensorBoard's folder inside `--logging_dir`."""

TRACKERS = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
"""Values of `--report_to` that name a tracker, each the name of its package as well, and whether it is installed."""


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `--report_to` stands for, as `Accelerator(log_with=… or None)` takes them; each once.

    report_to: one or more of `TRACKERS`, "all" for those that are installed, or "none".
    """
    given = [report_to] if isinstance(report_to, str) else report_to
    installed = [name for name, is_installed in TRACKERS.items() if is_installed()] if "all" in given else []
    return list(dict.fromkeys([*installed, *(name for name in given if name not in ("all", "none"))]))


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Make sure that what `--report_to` names is installed, and that W&B knows the user where it works online.

    Raises:
        InputError: a package is missing, or nobody is logged in.
    """
    names, given = tracker_names(report_to), report_to if isinstance(report_to, str) else " ".join(report_to)
    if "all" in given and not names:
        raise InputError(f"--report_to all: none is installed; pip install {' or '.join(TRACKERS)}")
    for name in names:
        if not TRACKERS[name]():
            raise InputError(f"--report_to {name}: the package is missing; pip install {name}")
    if "wandb" in names:
        _check_login(given)


def _check_login(report_to: str) -> None:
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    reason = "nobody is logged in"
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        logged_in, reason = False, str(error)
    if not logged_in:
        raise InputError(f"--report_to {report_to}: W&B: {reason}; `wandb login`, or set WANDB_MODE=offline")


def init_kwargs(logging_dir: str | Path) -> dict[str, dict[str, Any]]:
    """What `Accelerator.init_trackers` passes on, so that all trackers write below one folder, which is created."""
    # Where the folder is missing, wandb writes to another place.
    Path(logging_dir).mkdir(parents=True, exist_ok=True)
    return {"wandb": {"dir": str(logging_dir)}}


def log_images(accelerator: Accelerator, title: str, images: Sequence[Image.Image], step: int) -> None:
    """Log images of one size to every tracker of the run; without trackers this does nothing.

    Args:
        accelerator: its trackers are initialised.
        title: what they are shown under, e.g. the prompt.
        images: at least one.
        step: optimiser steps done; W&B drops what is older than what it has.
    """
    batch = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (n, h, w, 3), uint8
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({title: batch}, step=step, **options)
