"""The running average of what is trained, which generates more steadily than the last step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RunningAverage:
    """An exponential moving average of parameters: a ← δa + (1 − δ)p, δ = min(decay, (1 + t)/(10 + t)).

    t counts the updates before, from 0; a starts as the parameters that it is made from. The rising δ lets the average
    leave the start early on. Source: `num_updates` of TensorFlow's ExponentialMovingAverage; diffusers' EMAModel has
    the same default, but writes to parameters through `.data`, which leaves their version as it was, so that what
    layers keep by version would be stale.

    Args:
        parameters: what is averaged. The average has their shapes, dtypes and devices.
        decay: the largest δ.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.average = [each.detach().clone() for each in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are; called after each step of the optimiser."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters hold the average; on leaving they hold, to the bit, what they did."""
        found = [each.detach().clone() for each in self.parameters]
        self.apply()
        try:
            yield
        finally:
            self._write(found)

    def apply(self) -> None:
        """Write the average to the parameters, for good."""
        self._write(self.average)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, as `torch.load` reads them with weights only."""
        return {"average": list(self.average), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; the tensors are copied.

        Raises:
            ValueError: it is of other parameters.
        """
        shapes, saved = ([tuple(each.shape) for each in tensors] for tensors in (self.average, state["average"]))
        if shapes != saved:
            raise ValueError(f"the running average does not fit: its shapes are {saved}, those trained {shapes}")
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)
        self.updates = state["updates"]
