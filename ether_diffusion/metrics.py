"""Metrics of controlled generation: does a picture show what its control picture asks for, and does it look real?

Segmentation by a judge gives mean intersection over union and pixel accuracy; edges give an F1; sets of pictures give
a Fréchet distance. The numbers of a segmentation come from counts, which add up over batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

FEATURES = ("inception", "miniature")
EDGE_THRESHOLD = 0.5
FID_BATCH = 50

# Axes: n pictures, h and w pixels, k classes, d features.

# Segmentation ---------------------------------------------------------------------------------------------------


def confusion(predicted: Tensor, truth: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Count of pixels for each pair of classes: C[t, p] = #{pixels of class t that are named p}.

    Args:
        predicted, truth: class indices of any integer dtype, on one device and of one shape, such as (n, h, w).
        classes: k; indices run from 0 to k − 1.
        ignore_index: pixels whose truth has this value are not counted. It may lie outside of the classes.

    Returns:
        (k, k), int64. Counts of batches may be added.

    Raises:
        ValueError: other shapes, other dtypes, or an index that is no class.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"confusion: predicted {tuple(predicted.shape)}, truth {tuple(truth.shape)}; need one shape")
    for name, indices in (("predicted", predicted), ("truth", truth)):
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"confusion: {name} is {indices.dtype}, needs whole numbers: indices of classes")
    predicted, truth = predicted.flatten().long(), truth.flatten().long()
    if ignore_index is not None:
        counted = truth != ignore_index
        predicted, truth = predicted[counted], truth[counted]
    for name, indices in (("predicted", predicted), ("truth", truth)):
        if indices.numel() and not (0 <= indices.min() and indices.max() < classes):
            wrong = indices[(indices < 0) | (indices >= classes)][0]
            raise ValueError(f"confusion: {name} has the index {wrong}, needs 0 to {classes - 1}")
    return torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class: C[c, c] / (Σ_p C[c, p] + Σ_t C[t, c] − C[c, c]).

    counts: (k, k) of `confusion`; returns (k,), float64. A class that neither truth nor prediction has is NaN.
    """
    counts = counts.double()
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def mean_iou(counts: Tensor) -> float:
    """Mean of `class_iou` over the classes that the truth or the prediction has, from 0 to 1.

    A class that is in neither is left out; one that was only predicted counts as 0. Counts come first and the mean
    last: it is the mean IoU of the whole set, not the mean over its pictures.

    counts: (k, k), summed over the set.

    Raises:
        ValueError: nothing was counted.
    """
    _check_counts(counts)
    return class_iou(counts).nanmean().item()


def pixel_accuracy(counts: Tensor) -> float:
    """Share of the counted pixels that are named right: tr C / Σ C, from 0 to 1.

    counts: (k, k), summed over the set.

    Raises:
        ValueError: nothing was counted.
    """
    _check_counts(counts)
    counts = counts.double()
    return (counts.trace() / counts.sum()).item()


def _check_counts(counts: Tensor) -> None:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"counts are {tuple(counts.shape)}, need (classes, classes)")
    if not counts.sum() > 0:
        raise ValueError("no pixels were counted; at least one needs a truth that is not ignored")


class Segmenter(Protocol):
    """A judge: names the class of every pixel."""

    classes: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of one size -> class indices, (n, h, w), int64, at the pictures' size."""
        ...


class UperNetSegmenter:
    """A UperNet from the Hub or a folder; the usual ones name the 150 classes of ADE20K.

    Args:
        model_id: as `from_pretrained` takes it.
        device: where it computes.
    """

    def __init__(self, model_id: str = "openmmlab/upernet-convnext-small", device: torch.device | str = "cpu"):
        self.model = UperNetForSemanticSegmentation.from_pretrained(model_id).eval().to(device)
        # The processor on PIL needs no torchvision.
        self.processor = AutoImageProcessor.from_pretrained(model_id, backend="pil")
        self.classes: int = self.model.config.num_labels
        self.names = tuple(self.model.config.id2label[k] for k in range(self.classes))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        logits = self.model(inputs.pixel_values.to(self.model.device)).logits  # (n, k, h', w')
        width, height = images[0].size
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits.argmax(1).cpu()


# Edges ----------------------------------------------------------------------------------------------------------


def sobel_edges(image: Image.Image, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Pixels at which a colour changes: √(gₓ² + g_y²) > threshold in any channel, with Sobel's kernels.

    image: read as RGB, channels from 0 to 1. Colours of one brightness have edges between them, too.
    threshold: 4 is the gradient of a straight step from 0 to 1.

    Returns:
        (h, w), bool. An edge is two pixels wide. The picture goes on beyond its border as at its border.
    """
    channels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
    channels = channels.permute(2, 0, 1)[:, None]  # (3, 1, h, w)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack((across, across.T))[:, None]
    gradient = F.conv2d(F.pad(channels, (1, 1, 1, 1), mode="replicate"), kernels)  # (3, 2, h, w)
    return gradient.norm(dim=1).amax(0) > threshold


def edge_consistency(
    image: Image.Image, edge_map: Image.Image, threshold: float = EDGE_THRESHOLD, tolerance: int = 1
) -> float:
    """How well the edges of a picture are those of its edge map: F1 = 2PR / (P + R), from 0 to 1.

    P is the share of the picture's edges that lie within `tolerance` pixels (of the larger of both distances) of an
    edge of the map, R the share of the map's edges that lie so near to one of the picture.

    Args:
        image: the picture.
        edge_map: of the same size, edges white on black; what is brighter than the middle grey is an edge.
        threshold: as for `sobel_edges`.
        tolerance: in pixels.

    Returns:
        The F1; 1 where neither has edges, 0 where only one has.

    Raises:
        ValueError: the two have different sizes.
    """
    if image.size != edge_map.size:
        raise ValueError(f"edge_consistency: the picture is {image.size}, its edge map {edge_map.size}; need one size")
    found = sobel_edges(image, threshold)
    wanted = torch.from_numpy(np.asarray(edge_map.convert("L")) > 127)
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (_dilate(wanted, tolerance) & found).sum() / found.sum()
    recall = (_dilate(found, tolerance) & wanted).sum() / wanted.sum()
    total = precision + recall
    return (2 * precision * recall / total).item() if total else 0.0


def _dilate(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[None].float(), 2 * by + 1, stride=1, padding=by)[0] > 0


# Sets of pictures -----------------------------------------------------------------------------------------------


class MiniatureFeatures(nn.Module):
    """Pooled features of the miniature's own CLIP vision tower: (n, 3, h, w) uint8 -> (n, d).

    It knows the miniature's world alone: distances in it are not comparable with published FIDs.
    """

    def __init__(self) -> None:
        super().__init__()
        from .miniature import ClipScore  # loads the miniature, which full-size work does without

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

    μ, Σ: mean and covariance of the features of the pictures, ν, Ω: of the references. Computed by torchmetrics. The
    estimate falls as sets grow, so compare only sets of one size. Source: arXiv:1706.08500, eq. 6.

    Args:
        pictures, references: at least two of each, of any sizes.
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
            f"frechet_distance: got {len(pictures)} pictures and {len(references)} references, needs two of each"
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
    """(n, 3, h, w), uint8, of pictures of one size."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
