"""What tests do with the training scripts: call them in this process, launch them as users do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from ether_diffusion.adapters.schema import WEIGHTS_NAME

ROOT = Path(__file__).parents[2]
DREAMBOOTH = ROOT / "train_dreambooth_ether.py"
CONTROLNET = ROOT / "train_controlnet_ether.py"
STEADY = ("--adam_epsilon", "1e-3")
"""For runs that are compared to rounding: AdamW makes no whole step of a gradient that is nothing but rounding."""


def wait_until(happened: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.05)


def reset_accelerate() -> None:
    """Forget the devices and precision of the last run in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def launch(script: Path | str, *flags: object, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` on the CPU; more than one process through torchrun, which really starts them.

    script: a file, or the name of a module.
    """
    started = [str(script)] if isinstance(script, Path) else ["-m", script]
    command = [sys.executable, "-m", "accelerate.commands.launch", *started, *map(str, flags)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *command[3:]]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def vectors(folder: Path) -> torch.Tensor:
    """All that an ETHER adapter's file holds, as one vector."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / WEIGHTS_NAME).items())])
