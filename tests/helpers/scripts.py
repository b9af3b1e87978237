"""What tests do with the training scripts: call them in this process, launch them as users do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
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


REPLACED = {
    "--dataset_name": ("--instance_data_dir", "--train_data_dir"),
    "--num_train_epochs": ("--max_train_steps",),
    "none": ("--learning_rate",),  # of --method
}


def in_process(main: Callable, usual: dict[str, object], folder: Path) -> Callable:
    """A script's own main, in this process: call(*flags, output=…) -> (result, output folder).

    usual: flags that are given where the call gives none, nor one that stands in their place.
    """

    def call(*flags: object, output: str = "out"):
        reset_accelerate()
        flags = tuple(map(str, flags))
        given = {*flags, *(flag for word in flags for flag in REPLACED.get(word, ()))}
        more = {"--output_dir": folder / output, **usual}
        words = [str(word) for flag, value in more.items() if flag not in given for word in (flag, value)]
        return main([*words, *flags]), folder / output

    return call


def refusal(capsys, call: Callable, *flags: object) -> str:
    """What a script says of flags that it refuses: one line, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: "), line
    return line


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run left in safetensors files, but for its checkpoints."""
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoint-" not in str(path)
        for name, tensor in load_file(path).items()
    }


def same(one: Path, two: Path) -> bool:
    """Whether two runs left the same, bit for bit."""
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def vectors(folder: Path) -> torch.Tensor:
    """All that an ETHER adapter's file holds, as one vector."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / WEIGHTS_NAME).items())])
