"""The miniature's own CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ether_diffusion.base_models import MINIATURE, MINIATURES
from ether_diffusion.metrics.similarity import BATCH, ClipFeatures
from ether_diffusion.miniature.render import to_tensor

FOLDER = MINIATURES[MINIATURE]
"""`clip/` in it holds the model."""


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
