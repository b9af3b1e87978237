"""The running average of what is trained, which generates more steadily than the last step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from torch import nn


class RunningAverage(EMAModel):
    """An exponential moving average of parameters: a ← δa + (1 − δ)p, δ = min(decay, (1 + t)/(10 + t)).

    t counts the updates before, from 0; a starts as the parameters that it is made from. The rising δ lets the average
    leave the start early on. Source: `num_updates` of TensorFlow's ExponentialMovingAverage.

    Args:
        parameters: what is averaged. The average has their shapes, dtypes and devices.
        decay: the largest δ.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters = list(parameters)
        super().__init__(self.parameters, decay, foreach=True)  # one operation for all: they are many and small

    def get_decay(self, optimization_step: int) -> float:
        """δ of an update; the first is number 1. EMAModel's own would be 0 there, and forget the start."""
        return min(self.decay, optimization_step / (9 + optimization_step))

    def update(self) -> None:
        """Take in the parameters as they are; called after each step of the optimiser."""
        self.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters hold the average; on leaving they hold, to the bit, what they did."""
        self.store(self.parameters)
        try:
            self.apply()
            yield
        finally:
            self.restore(self.parameters)

    def apply(self) -> None:
        """Write the average to the parameters, for good."""
        self.copy_to(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, in the form that all training checkpoints have."""
        return {"average": self.shadow_params, "updates": self.optimization_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; the tensors are copied.

        Raises:
            ValueError: it is of other parameters.
        """
        shapes, saved = ([tuple(each.shape) for each in tensors] for tensors in (self.parameters, state["average"]))
        if shapes != saved:
            raise ValueError(f"the running average does not fit: its shapes are {saved}, those trained {shapes}")
        super().load_state_dict({"shadow_params": state["average"], "optimization_step": state["updates"]})
        self.shadow_params = [a.to(p.device) for a, p in zip(self.shadow_params, self.parameters, strict=True)]
