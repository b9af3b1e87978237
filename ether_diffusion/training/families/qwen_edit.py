"""Editors of Qwen-Image: the language model sees the reference image, too, and the transformer its tokens."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from ether_diffusion.errors import InputError
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.qwen import QwenImage


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit, whose text encoder reads a prompt together with the reference image.

    Class attributes:
        seen_area: pixels of a reference image as the text encoder sees it.
    """

    pipeline_class = "QwenImageEditPipeline"
    takes_references = reads_references = True
    seen_area: ClassVar[int] = 1024**2

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[Tensor]] | None = None
    ) -> list[Conditioning]:
        """States (tokens, width) of each prompt and its reference images (3, height, width), from -1 to 1."""
        if references is None:
            raise InputError(
                f"a {self.pipeline_class} reads prompts together with reference images; give one for each"
            )
        rows = []
        for prompt, images in zip(prompts, references, strict=True):
            states, _ = self.pipe.encode_prompt(prompt, self._seen(images), device=self.device)
            rows.append({"prompt_embeds": states[0]})
        return rows

    def _seen(self, references: Sequence[Tensor]) -> Any:
        """What the pipeline shows to its text encoder."""
        return self._sized(references[0])

    def _sized(self, pixels: Tensor) -> Image.Image:
        image = self.pipe.image_processor.postprocess(pixels[None], output_type="pil")[0]
        ratio = image.width / image.height
        width = math.sqrt(self.seen_area * ratio)
        width, height = (round(side / 32) * 32 for side in (width, width / ratio))  # as the pipeline rounds them
        return self.pipe.image_processor.resize(image, height, width)


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit of 2509 and later, with several reference images."""

    pipeline_class = "QwenImageEditPlusPipeline"
    seen_area = 384**2

    def _seen(self, references: Sequence[Tensor]) -> Any:
        return [self._sized(pixels) for pixels in references]
