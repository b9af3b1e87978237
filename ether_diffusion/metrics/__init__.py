"""Metrics of images: their likeness to a subject and to words, their obedience to a control, their realism."""

from ether_diffusion.metrics.edges import EDGE_THRESHOLD, edge_consistency, sobel_edges
from ether_diffusion.metrics.frechet import frechet_distance
from ether_diffusion.metrics.segmentation import (
    Segmenter,
    UperNetSegmenter,
    class_iou,
    confusion,
    mean_iou,
    pixel_accuracy,
)
from ether_diffusion.metrics.similarity import (
    ClassTokenFeatures,
    ClipFeatures,
    ImageFeatures,
    Lpips,
    TextImageFeatures,
    diversity,
    drift,
    image_similarity,
    load_features,
    text_similarity,
)

__all__ = [
    "EDGE_THRESHOLD",
    "ClassTokenFeatures",
    "ClipFeatures",
    "ImageFeatures",
    "Lpips",
    "Segmenter",
    "TextImageFeatures",
    "UperNetSegmenter",
    "class_iou",
    "confusion",
    "diversity",
    "drift",
    "edge_consistency",
    "frechet_distance",
    "image_similarity",
    "load_features",
    "mean_iou",
    "pixel_accuracy",
    "sobel_edges",
    "text_similarity",
]
