"""Fréchet distance between sets of images: do they look as real ones do?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

FEATURES = ("inception", "miniature")
FID_BATCH = 50

# Axes: n images, h and w pixels, d features.


class MiniatureFeatures(nn.Module):
    """Pooled features of the miniature's own CLIP vision tower: (n, 3, h, w) uint8 -> (n, d).

    It knows the miniature's world alone: distances in it are not comparable with published FIDs.
    """

    def __init__(self) -> None:
        super().__init__()
        from ether_diffusion.miniature import ClipScore

        self.tower = ClipScore().model.vision_model
        self.side: int = self.tower.config.image_size
        self.num_features: int = self.tower.config.hidden_size

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 127.5 - 1
        if values.shape[-2:] != (self.side, self.side):
            values = F.interpolate(values, size=(self.side, self.side), mode="bilinear", antialias=True)
        return self.tower(pixel_values=values).pooler_output


def frechet_distance(
    pictures: Sequence[Image.Image],
    references: Sequence[Image.Image],
    *,
    features: str | nn.Module = "inception",
    device: torch.device | str = "cpu",
) -> float:
    """Fréchet distance between the features of two sets: |μ − ν|² + tr(Σ + Ω − 2(ΣΩ)^½), from sums in float64.

    μ, Σ: mean and covariance of the features of the images, ν, Ω: of the references. Computed by torchmetrics. The
    estimate falls as sets grow, so compare only sets of one size. Source: arXiv:1706.08500, eq. 6.

    Args:
        images, references: at least two of each, of any sizes.
        features: "inception": InceptionV3 as torch-fidelity holds it, that of published FIDs (downloads its weights;
            needs the extra `eval`); "miniature": `MiniatureFeatures`, not comparable with published FIDs; or a module
            that gives (n, d) for (n, 3, h, w), uint8.
        device: where features are computed.

    Raises:
        ImportError: torchmetrics is missing, or torch-fidelity, for "inception".
        ValueError: an unknown extractor, or a set of fewer than two.
    """
    if isinstance(features, str) and features not in FEATURES:
        raise ValueError(f"features: got {features!r}, needs one of {', '.join(FEATURES)}, or a module")
    if min(len(pictures), len(references)) < 2:
        raise ValueError(
            f"frechet_distance: got {len(pictures)} images and {len(references)} references, needs two of each"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        extractor = {"inception": lambda: 2048, "miniature": MiniatureFeatures}.get(features, lambda: features)()
        metric = FrechetInceptionDistance(feature=extractor)
    except ImportError as error:
        raise ImportError(f'Fréchet distance: {error}; pip install "ether-diffusion[eval]"') from error
    metric = metric.to(device)
    for images, real in ((references, True), (pictures, False)):
        for _, group in itertools.groupby(images, key=lambda image: image.size):
            group = list(group)
            for start in range(0, len(group), FID_BATCH):
                metric.update(_to_bytes(group[start : start + FID_BATCH]).to(device), real=real)
    return metric.compute().item()


def _to_bytes(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, h, w), uint8, of images of one size."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
