"""The maths of a batch with an adapter for each row: y_i = W x_i + B_i A_i x_i, as two batched products.

A row must not depend on what the other rows hold, bit for bit. So factors are padded with zeros to a rank that their
own rank alone decides (`padded_rank`), and rows of one padded rank are one pass over the whole batch: the shapes of
the products of a row are the same whatever the others have, and a row that has nothing in a pass takes its output as
it was (adding zero would turn −0.0 into 0.0).

Axes: b rows of the batch, i inputs and o outputs of a layer, k positions of its kernel, R the padded rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALLEST_RANK = 4
"""Of ETHER+ with one block. What has a lower rank, ETHER with one block, shares its pass."""


def padded_rank(rank: int) -> int:
    """The power of two, at least `SMALLEST_RANK`, to which factors of this rank are padded."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


class Pass(NamedTuple):
    """What the rows of one padded rank add in one layer.

    down: (b, R, i·k); up: (b, R, o); zeros for rows of another rank.
    of: (b, 1, 1), which rows have this rank; None where all do.
    """

    down: Tensor
    up: Tensor
    of: Tensor | None


def add_linear(x: Tensor, y: Tensor, change: Pass) -> Tensor:
    """y + (x · down) · up on the rows of a pass: x (b, …, i) and y (b, …, o) of a linear layer; or (b·m, …), m rows to
    a sample.
    """
    inputs = x.reshape(len(change.down), -1, x.shape[-1])
    outputs = y.reshape(len(change.down), -1, y.shape[-1])
    return _finish(torch.baddbmm(outputs, inputs @ change.down.mT, change.up), outputs, y, change)


def add_convolution(x: Tensor, y: Tensor, change: Pass, layer: nn.Conv2d) -> Tensor:
    """The same for a convolution: x (b, i, h, w) and y (b, o, h', w').

    The inputs of all rows are the groups of one convolution to the ranks; from there to the outputs it is a product.
    """
    rows, channels, height, width = x.shape
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    inner = nn.functional.conv2d(
        x.reshape(1, rows * channels, *x.shape[2:]),
        change.down.reshape(-1, channels, *layer.kernel_size),
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=rows,
    )
    outputs = y.flatten(2)  # (b, o, h'·w')
    return _finish(torch.baddbmm(outputs, change.up.mT, inner.view(rows, -1, outputs.shape[-1])), outputs, y, change)


def _finish(changed: Tensor, outputs: Tensor, y: Tensor, change: Pass) -> Tensor:
    """In the shape of y, and as it lies in memory: the layers after this one would compute other bits."""
    if change.of is not None:
        changed = torch.where(change.of, changed, outputs)
    changed = changed.view(y.shape)
    return changed if changed.stride() == y.stride() else torch.empty_like(y).copy_(changed)
