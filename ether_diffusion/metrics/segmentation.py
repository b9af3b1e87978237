"""Scores of segmentation: mean intersection over union and pixel accuracy, from counts that add up over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

# Axes: n images, h and w pixels, k classes.


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
    last: it is the mean IoU of the whole set, not the mean over its images.

    counts: (k, k), summed over the set.

    Raises:
        ValueError: nothing was counted.
    """
    return class_iou(_checked(counts)).nanmean().item()


def pixel_accuracy(counts: Tensor) -> float:
    """Share of the counted pixels that are named right: tr C / Σ C, from 0 to 1.

    counts: (k, k), summed over the set.

    Raises:
        ValueError: nothing was counted.
    """
    counts = _checked(counts)
    return (counts.trace() / counts.sum()).item()


def _checked(counts: Tensor) -> Tensor:
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"counts are {tuple(counts.shape)}, need (classes, classes)")
    if not counts.sum() > 0:
        raise ValueError("no pixels were counted; at least one needs a truth that is not ignored")
    return counts.double()


class Segmenter(Protocol):
    """Names the class of every pixel."""

    classes: int

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of one size -> class indices, (n, h, w), int64, at the images' size."""
        ...


class UperNetSegmenter:
    """A UperNet from the Hub or a folder, as `from_pretrained` takes it; the usual ones name ADE20K's 150 classes."""

    def __init__(self, model_id: str = "openmmlab/upernet-convnext-small", device: torch.device | str = "cpu"):
        self.model = UperNetForSemanticSegmentation.from_pretrained(model_id).eval().to(device)
        # The processor on PIL needs no torchvision.
        self.processor = AutoImageProcessor.from_pretrained(model_id, backend="pil")
        self.classes: int = self.model.config.num_labels

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        logits = self.model(inputs.pixel_values.to(self.model.device)).logits  # (n, k, h', w')
        width, height = images[0].size
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits.argmax(1).cpu()
