"""The miniature: a small Stable Diffusion pipeline with a world of its own, shipped with the package.

It is a toy-sized stand-in (64×64 pixels, about 9 million parameters) on which everything can be tried in minutes
without a GPU or a download. Nothing measured on it is a result about Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

FOLDER = Path(__file__).parent / "weights"
"""A folder that `StableDiffusionPipeline.from_pretrained` loads as it is; `clip/` in it holds the metric model."""


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The miniature as a stock pipeline, every part in `dtype`."""
    return StableDiffusionPipeline.from_pretrained(FOLDER, dtype=dtype)


class ClipScore:
    """The miniature's own CLIP, trained on its world alone and not a part of the pipeline: measures similarity."""

    def __init__(self) -> None:
        self.model = CLIPModel.from_pretrained(FOLDER / "clip").eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit embeddings of pictures of any size: (len(images), d)."""
        size = (self.model.config.vision_config.image_size,) * 2
        pixels = np.stack([np.asarray(image.convert("RGB").resize(size)) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        pooled = self.model.vision_model(pixel_values=values).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of prompts: (len(texts), d)."""
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        pooled = self.model.text_model(input_ids=ids.input_ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def image_similarity(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
        """Mean cosine similarity over all pairs of a picture and a reference (CLIP-I)."""
        return (self.embed_images(images) @ self.embed_images(references).T).mean().item()

    def text_similarity(self, images: Sequence[Image.Image], texts: Sequence[str]) -> float:
        """Mean cosine similarity of each picture to its own text (CLIP-T)."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1).mean().item()
