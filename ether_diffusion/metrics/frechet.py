"""Fréchet distance between sets of images: do they look as real ones do?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from ether_diffusion.images import to_bytes

INCEPTION, INCEPTION_WIDTH = "inception", 2048
BATCH = 50


def frechet_distance(
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    *,
    features: str | nn.Module = INCEPTION,
    device: torch.device | str = "cpu",
) -> float:
    """Fréchet distance between the features of two sets: |μ − ν|² + tr(Σ + Ω − 2(ΣΩ)^½), from sums in float64.

    μ, Σ: mean and covariance of the features of the images, ν, Ω: of the references. Computed by torchmetrics. The
    estimate falls as sets grow, so compare only sets of one size. Source: arXiv:1706.08500, eq. 6.

    Args:
        images, references: at least two of each, of any sizes.
        features: "inception": InceptionV3 as torch-fidelity holds it, that of published FIDs (downloads its weights;
            needs the extra `eval`); or a module that gives d features, (n, d), for n images (n, 3, h, w), uint8.

    Raises:
        ImportError: torchmetrics is missing, or torch-fidelity, for "inception".
        ValueError: an unknown extractor, or a set of fewer than two.
    """
    if isinstance(features, str) and features != INCEPTION:
        raise ValueError(f"features: got {features!r}, needs {INCEPTION!r} or a module")
    if min(len(images), len(references)) < 2:
        raise ValueError(
            f"frechet_distance: got {len(images)} images and {len(references)} references, needs two of each"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=INCEPTION_WIDTH if features == INCEPTION else features)
    except ImportError as error:
        raise ImportError(f'Fréchet distance: {error}; pip install "ether-diffusion[eval]"') from error
    metric = metric.to(device)
    for part, real in ((references, True), (images, False)):
        for _, group in itertools.groupby(part, key=lambda image: image.size):
            group = list(group)
            for start in range(0, len(group), BATCH):
                metric.update(to_bytes(group[start : start + BATCH]).to(device), real=real)
    return metric.compute().item()
