"""Lumina Image 2: states of Gemma 2 after a system prompt, latents as they are, and time that runs to the image."""

from collections.abc import Sequence

from torch import Tensor

from ether_diffusion.tokens import pad_rows
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.prefixed import PrefixedFamily


class Lumina2(PrefixedFamily):
    """Lumina Image 2.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "Lumina2Pipeline"
    length = 256

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States (tokens, width) of the system prompt and each prompt."""
        states, mask, _, _ = self.pipe.encode_prompt(list(prompts), False, device=self.device)
        return [{"prompt_embeds": row[seen.bool()]} for row, seen in zip(states, mask, strict=True)]

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The velocity, in the shape of the latents."""
        transformer = self.component(self.denoiser)
        rows = [row["prompt_embeds"].to(transformer.dtype) for row in conditioning]
        states, mask = pad_rows(rows, max(map(len, rows)))
        return -transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=1 - levels,
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            return_dict=False,
        )[0]
