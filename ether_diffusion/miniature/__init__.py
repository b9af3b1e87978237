"""The miniature: a small Stable Diffusion pipeline with a world of its own, shipped with the package.

It is a toy-sized stand-in (64×64 pixels, about 9 million parameters) on which everything can be tried in minutes
without a GPU or a download. Nothing measured on it is a result about Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ether_diffusion.files import MINIATURE_FOLDER
from ether_diffusion.metrics.similarity import BATCH, ClipFeatures
from ether_diffusion.miniature.render import to_tensor

FOLDER = MINIATURE_FOLDER
"""A folder that `StableDiffusionPipeline.from_pretrained` loads as it is; `clip/` in it holds the metric model."""


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The miniature as a stock pipeline, every part in `dtype`."""
    return StableDiffusionPipeline.from_pretrained(FOLDER, dtype=dtype)


class ClipScore(ClipFeatures):
    """The miniature's own CLIP, trained on its world alone and not a part of the pipeline: measures similarity."""

    def __init__(self, *, device: torch.device | str = "cpu", batch_size: int = BATCH) -> None:
        self.model = CLIPModel.from_pretrained(FOLDER / "clip").eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
        self.batch_size = batch_size

    def _pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        # The whole image, never a part of it, is brought to the tower's size.
        size = (self.model.config.vision_config.image_size,) * 2
        return to_tensor([image.convert("RGB").resize(size) for image in images])
