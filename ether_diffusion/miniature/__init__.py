"""The miniatures: small pipelines with a world of their own, shipped with the package.

They are toy-sized stand-ins (64×64 pixels, up to 9 million parameters) on which everything can be tried in minutes
without a GPU or a download: a UNet that predicts noise, as in Stable Diffusion, and a transformer with flow matching,
as in Stable Diffusion 3. Nothing measured on them is a result about those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ether_diffusion.base_models import MINIATURE, MINIATURES, open_pipeline
from ether_diffusion.metrics.similarity import BATCH, ClipFeatures
from ether_diffusion.miniature.render import to_tensor

FOLDERS = MINIATURES
"""Name -> a folder in diffusers' layout. `StableDiffusion3Pipeline.from_pretrained` of the transformer's is told
`text_encoder_3=None, tokenizer_3=None`, as for any folder without T5."""
FOLDER = FOLDERS[MINIATURE]
"""That of the first, a `StableDiffusionPipeline`; `clip/` in it holds the metric model."""
SHORT_NAMES = {"unet": MINIATURE, "dit": "miniature-dit"}


def load_pipeline(name: str = "unet", *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A miniature as a stock pipeline, every part in `dtype`.

    Args:
        name: "unet" (a `StableDiffusionPipeline`) or "dit" (a `StableDiffusion3Pipeline`); or as commands name them,
            "miniature" and "miniature-dit".

    Raises:
        ValueError: another name.
    """
    folder = FOLDERS.get(SHORT_NAMES.get(name, name))
    if folder is None:
        raise ValueError(f"there is no miniature {name!r}; there are {', '.join(SHORT_NAMES)}")
    return open_pipeline(folder, dtype=dtype)


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
