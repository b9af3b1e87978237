"""Edges: does an image have those of its edge map?"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

EDGE_THRESHOLD = 0.5

# Axes: h and w pixels.


def sobel_edges(image: Image.Image, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Pixels at which a colour changes: √(gₓ² + g_y²) > threshold in any channel, with Sobel's kernels.

    image: read as RGB, channels from 0 to 1. Colours of one brightness have edges between them, too.
    threshold: 4 is the gradient of a straight step from 0 to 1.

    Returns:
        (h, w), bool. An edge is two pixels wide. The image goes on beyond its border as at its border.
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
    """How well the edges of an image are those of its edge map: F1 = 2PR / (P + R), from 0 to 1.

    P is the share of the image's edges that lie within `tolerance` pixels (of the larger of both distances) of an
    edge of the map, R the share of the map's edges that lie so near to one of the image.

    edge_map: of the image's size, edges white on black; what is brighter than the middle grey is an edge.
    threshold: as for `sobel_edges`.

    Returns 1 where neither has edges, 0 where only one has.

    Raises:
        ValueError: the two have different sizes.
    """
    if image.size != edge_map.size:
        raise ValueError(f"edge_consistency: the image is {image.size}, its edge map {edge_map.size}; need one size")
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
