"""What families share whose pipelines put an instruction before every prompt but the negative one."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ether_diffusion.tokens import pad_rows
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.flow import FlowFamily


class PrefixedFamily(FlowFamily):
    """Prompts after an instruction, padded to one length and masked.

    Class attributes:
        length: of prompts, in tokens, as the pipeline takes them.
    """

    text_encoders = ("text_encoder",)
    length: ClassVar[int]

    def encode_negative(self, references: Sequence[Tensor] = ()) -> Conditioning:
        """States (tokens, width) of the negative prompt, which has no instruction before it."""
        _, _, states, mask = self.pipe.encode_prompt("", True, self.negative_prompt, device=self.device)
        return {"prompt_embeds": states[0, mask[0].bool()]}

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        states, mask = pad_rows([row["prompt_embeds"] for row in conditioning], self.length)
        return {"prompt_embeds": states, "prompt_attention_mask": mask.long()}
