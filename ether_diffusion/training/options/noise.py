"""How noisy what is trained on is: for models of flow matching."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import FROM_ZERO, Fits, OptionGroup, option

SAMPLINGS = ("uniform", "logit_normal")
AUTO, SAMPLING, GUIDANCE = "auto", "logit_normal", 1.0


def _is_shift(text: str) -> bool:
    try:
        return text == AUTO or 0 < float(text) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class FlowOptions(OptionGroup):
    """flow matching (transformers alone)"""

    timestep_sampling: str | None = option(
        f"How the share of noise is drawn: logit_normal prefers the middle, uniform does not. Default: {SAMPLING}.",
        None,
        choices=SAMPLINGS,
    )
    timestep_shift: str | None = option(
        "Shift of the share of noise towards noise, s in s·σ / (1 + (s − 1)·σ). Default: auto, the scheduler's at the "
        "size of the training images.",
        None,
        fits=Fits(f'"{AUTO}" or a number above 0', _is_shift),
    )
    guidance_embedding: float | None = option(
        f"What a model with an embedding of the guidance is told in training. Default: {GUIDANCE:g}.",
        None,
        fits=FROM_ZERO,
    )

    @property
    def sampling(self) -> str:
        return self.timestep_sampling or SAMPLING

    @property
    def shift(self) -> float | None:
        """The shift asked for; None for the scheduler's."""
        return None if self.timestep_shift in (None, AUTO) else float(self.timestep_shift)

    @property
    def guidance(self) -> float:
        return GUIDANCE if self.guidance_embedding is None else self.guidance_embedding

    def resolved(self) -> dict[str, str | float]:
        """What the options come to: flag -> value."""
        return {
            "timestep_sampling": self.sampling,
            "timestep_shift": self.shift or AUTO,
            "guidance_embedding": self.guidance,
        }

    def check_meaning(self, is_flow: bool, for_steps: Mapping[str, Any], pipeline: str, *, has_guidance: bool) -> None:
        """Make sure that no option is given which has no meaning for a pipeline.

        Args:
            for_steps: flag -> value, of those that have one for noise in discrete timesteps alone.
            has_guidance: whether the model has an embedding of the guidance.

        Raises:
            InputError: one is.
        """
        for flag, value in for_steps.items():
            if is_flow and value is not None:
                raise InputError(
                    f"--{flag}: got {value}, has no meaning for {pipeline}, which is trained by flow matching; drop it"
                )
        if is_flow and self.guidance_embedding is not None and not has_guidance:
            raise InputError(f"--guidance_embedding: has no effect, this {pipeline} has no such embedding; drop it")
        for each in fields(self):
            if not is_flow and getattr(self, each.name) is not None:
                raise InputError(f"--{each.name}: has no effect on {pipeline}, which is no flow matching; drop it")
