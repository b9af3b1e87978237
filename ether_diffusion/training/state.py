"""The state of a run: everything that a training step changes, and the random generators of a process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoint_files import TrainingCheckpoint
from ether_diffusion.training.ema import RunningAverage


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
        """All but the parameters, as `load` takes it and `torch.load` reads it with weights only."""
        parts = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
        return {**parts, "losses": list(self.losses), "seconds": self.seconds}

    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, under its name in checkpoints; None where the run does without it."""
        names = ("optimizer", "schedule", "scaler", "average")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load(self, checkpoint: TrainingCheckpoint, process: int = 0) -> None:
        """Become what was saved.

        process: whose part of the optimiser's state to take, where that is divided.

        Raises:
            InputError: the checkpoint is of other vectors.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint.vectors.items()}
        if different := sorted(set(shapes.items()) ^ set(saved.items())):
            name = different[0][0]
            raise InputError(
                f"{checkpoint.path}: does not fit what is trained: {name} has shape {saved.get(name, 'none')} in it "
                f"and {shapes.get(name, 'none')} here"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(checkpoint.vectors[name])
        state = checkpoint.state
        for name, part in self._parts().items():
            divided = name == "optimizer" and self.divides_optimizer
            if part is not None:
                part.load_state_dict(state[name][process] if divided else state[name])
        self.losses, self.seconds = list(state["losses"]), state["seconds"]


def random_state() -> dict[str, Any]:
    """The global random generators of this process, as plain values and tensors."""
    algorithm, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        # As a tensor, and of a type that torch has: checkpoints are read with weights only, which knows no NumPy.
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
