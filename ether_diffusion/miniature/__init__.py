"""The miniatures: small pipelines with a world of their own, shipped with the package.

They are toy-sized stand-ins (64×64 pixels, up to 9 million parameters) on which everything can be tried in minutes
without a GPU or a download: a UNet that predicts noise, as in Stable Diffusion, and a transformer with flow matching,
as in Stable Diffusion 3. Nothing measured on them is a result about those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ether_diffusion.base_models import MINIATURE, MINIATURES, open_pipeline
from ether_diffusion.lazy import imported_later

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ether_diffusion.miniature.clip import ClipScore

__all__ = ["FOLDER", "FOLDERS", "SHORT_NAMES", "ClipScore", "load_pipeline"]

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


__getattr__, __dir__ = imported_later(__name__, {"ClipScore": "clip"})
