"""Which operator computes an adapted linear layer, and in which of its two forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ether_diffusion.tuner.operators import blocks, single_block
from ether_diffusion.tuner.operators.shared import SharedFactors
from ether_diffusion.tuner.transforms import Vectors, accurate_dtype, adapt_weight


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Vectors,
    strength: float = 1.0,
    form: str | None = None,
    shared: SharedFactors | None = None,
) -> Tensor:
    """An adapted linear layer, y = x W(α)ᵀ + b; see `transforms.adapt_weight` for W(α).

    Under autocast it computes in autocast's dtype, as `torch.nn.functional.linear` does; sums over the vectors and the
    weight's update are float32 in every dtype.

    Args:
        x: (..., i).
        weight: (o, i), frozen, of x's dtype (any dtype under autocast).
        bias: (o,) or None.
        vectors: float32.
        strength: α, not 0.
        form: "weight" or "low_rank"; default: the cheaper one.
        shared: the factors of these vectors, where they are made already (a single block).

    Returns:
        (..., o), in the dtype that `torch.nn.functional.linear` would give.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    low_rank = prefers_low_rank(math.prod(x.shape[:-1]), weight) if form is None else form == "low_rank"
    trained = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, bias, *vectors)
    )
    arguments = (x, weight, bias, strength, low_rank)
    if len(vectors.u) > 1:
        if trained:
            return blocks.AdaptedLinear.apply(*arguments, *vectors)
        return blocks.adapted_linear(*arguments[:3], vectors, *arguments[3:])[0]
    if trained and shared is None:
        return single_block.AdaptedLinear.apply(*arguments, *vectors)
    factors = single_block.own_factors(x, weight, vectors)[0] if shared is None else shared.read(x)
    if trained:
        return single_block.FactoredLinear.apply(*arguments, factors.halves, factors.right, factors.left)
    return single_block.adapted_linear(*arguments, factors)[0]  # without autograd's overhead


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float = 1.0) -> Tensor:
    """`transforms.adapt_weight`, in one pass over the weight where it is a matrix in a single block; not rounded.

    Returns:
        The weight's shape, in float32 (float64).
    """
    accurate = weight.to(accurate_dtype(weight.dtype))
    if strength == 0:
        return accurate
    tensors = (accurate, *vectors.named().values())
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if weight.ndim == 2 and len(vectors.u) == 1 and not differentiated:
        return single_block.adapted_weight(accurate, vectors, strength)
    return adapt_weight(accurate, vectors, strength)


def prefers_low_rank(rows: int, weight: Tensor) -> bool:
    """Whether the passes over activations cost less than those over the weight (memory traffic counts, not sums)."""
    outputs, inputs = weight.shape
    return rows * (outputs + inputs) < 2 * outputs * inputs
