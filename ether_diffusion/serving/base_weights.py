"""The weight that a layer multiplies with, whether it lies there plainly, quantised, cast for storage or offloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.tuner.base_layer import is_plain, offload_hook

CHUNK = 1024
"""Unit vectors that go through a layer at once."""


@torch.no_grad()
def effective_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(o, i, *kernel), in the accuracy that the layer computes with; on its device.

    dtype: of the layer's inputs. A linear layer whose weight cannot be read is asked what it makes of unit vectors.

    Raises:
        ValueError: a convolution whose weight cannot be read.
    """
    weight = layer.weight
    if is_plain(weight):
        return weight.detach()
    if isinstance(layer, nn.Conv2d):
        raise ValueError(f"its weight is a {type(weight).__name__} of {weight.dtype} on {weight.device}, not readable")
    hook = offload_hook(layer)
    device = torch.device(hook.execution_device) if hook is not None else weight.device
    bias = layer(torch.zeros(1, layer.in_features, dtype=dtype, device=device))
    columns = []
    for start in range(0, layer.in_features, CHUNK):
        size = min(CHUNK, layer.in_features - start)
        units = torch.zeros(size, layer.in_features, dtype=dtype, device=device)
        units[:, start : start + size].fill_diagonal_(1)
        columns.append(layer(units) - bias)
    return torch.cat(columns).T
