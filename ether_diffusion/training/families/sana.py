"""Sana: states of Gemma 2 after an instruction, latents of a deep compression autoencoder as they are."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ether_diffusion.control.pipelines import stock_class
from ether_diffusion.tokens import pad_rows
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.prefixed import PrefixedFamily
from ether_diffusion.training.families.source import ModelSource


class Sana(PrefixedFamily):
    """Sana and Sana 1.5.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "SanaPipeline"
    length = 300
    patch = 1
    distilled_classes = ("SanaSprintPipeline",)

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        if source.config()["_class_name"] in cls.distilled_classes or source.is_called("sprint"):
            return "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States (tokens, width) of each prompt after the instruction, without those of the instruction."""
        # `encode_prompt` has no instruction unless it is given one; the pipeline gives its own.
        instruction = (
            inspect.signature(stock_class(self.pipe).__call__).parameters["complex_human_instruction"].default
        )
        states, mask, _, _ = self.pipe.encode_prompt(
            list(prompts), False, device=self.device, complex_human_instruction=instruction
        )
        return [{"prompt_embeds": row[seen.bool()]} for row, seen in zip(states, mask, strict=True)]

    def size_inputs(self, target: Target) -> dict[str, Any]:
        """What the pipeline is told to generate images of this (height, width)."""
        # It would generate the nearest of its own sizes, and resize the image.
        return {**super().size_inputs(target), "use_resolution_binning": False}

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The velocity, in the shape of the latents."""
        transformer = self.component(self.denoiser)
        states, mask = pad_rows([row["prompt_embeds"].to(transformer.dtype) for row in conditioning])
        return transformer(
            noisy.to(transformer.dtype),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=1000 * levels * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
