"""An adapted linear layer as one operator with an analytic gradient: y = x W(α)ᵀ + b, with W(α) = W + α(H̃ W H − W).

The change of the weight is a sum of terms, W(α) − W = Σ_k f_k G_kᵀ X_k, of rank n each:

- a vector û of the input side has X = blockrows(û) and G = (Wû)ᵀ;
- a vector ũ of the output side has X = ũᵀ W H and G = blockrows(ũ).

So there are three forms of the same function, and `adapted_linear` takes the cheapest:

- weight side: make W(α), then one matrix product;
- low-rank side: y = x Wᵀ + Σ f_k (x X_kᵀ) G_k, cheaper where x has few rows;
- activation side (`moved`): reflect what goes into a layer and what comes out of it; works over any layer.

Nothing is kept for the backward pass but the layer's input and a few vectors; W(α) is made again there. No gradient of
the weight is ever made: it would be gᵀx, and all that is needed of it are its products with a few vectors.

Axes: N rows of x, i inputs, o outputs, n blocks.

Source: ETHER, arXiv:2405.20271, sections 3.2 to 3.4, differentiated here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.blocks import AdaptedByBlocks, adapted_by_blocks
from ether_diffusion.tuner.operators.reflection import Reflected, reflected
from ether_diffusion.tuner.operators.single_block import (
    AdaptedSingleBlock,
    adapted_single_block,
    adapted_weight_single_block,
)
from ether_diffusion.tuner.transforms import (
    Transform,
    Vectors,
    accurate_dtype,
    adapt_weight,
    gather,
    normalize_backward,
    project,
    unit_and_length,
)

Gradients = tuple[Tensor | None, ...]


def moved(x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """`functional.displacement`, keeping x and the raw vectors alone for the backward pass."""
    return _Moved.apply(x, u, v)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, u, v)
        with torch.autocast(x.device.type, enabled=False):
            transform = Transform.of(u, v, accurate_dtype(x.dtype))
            return transform.displace(x.to(transform.units[0].dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Gradients:
        x, u, v = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            transform = Transform.of(u, v, g.dtype)
            gx = transform.displace(g).to(x.dtype) if ctx.needs_input_grad[0] else None
            grads: list[Tensor | None] = [None, None]
            x, g = (a.to(g.dtype).reshape(-1, a.shape[-1]) for a in (x, g))  # (N, d)
            for k, raw in enumerate((u, v)):
                if ctx.needs_input_grad[1 + k]:
                    unit, length = unit_and_length(raw)
                    along = gather(x, project(g, unit), len(raw)) + gather(g, project(x, unit), len(raw))
                    grads[k] = normalize_backward(unit, length, transform.factors[k] * along).to(raw.dtype)
        return gx, *grads


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Vectors,
    strength: float = 1.0,
    form: str | None = None,
) -> Tensor:
    """y = x W(α)ᵀ + b; see `functional.adapt_weight` for W(α).

    Under autocast it computes in autocast's dtype, as `torch.nn.functional.linear` does; sums over the vectors and the
    weight's update are float32 in every dtype.

    Args:
        x: (..., i).
        weight: (o, i), frozen, of x's dtype (any dtype under autocast).
        bias: (o,) or None.
        vectors: float32.
        strength: α, not 0.
        form: "weight" or "low_rank"; default: the cheaper one.

    Returns:
        (..., o), in the dtype that `torch.nn.functional.linear` would give.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = math.prod(x.shape[:-1])
    low_rank = prefers_low_rank(rows, weight) if form is None else form == "low_rank"
    trained = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, bias, *vectors)
    )
    if len(vectors.u) > 1:
        operator, function = AdaptedByBlocks, adapted_by_blocks
    elif vectors.v is not None or vectors.u_out is not None:
        operator, function = AdaptedSingleBlock, adapted_single_block
    elif trained:
        return Reflected.apply(x, weight, bias, strength, low_rank, vectors.u)
    else:
        return reflected(x, weight, bias, vectors, strength, low_rank)[0]
    flat = x.reshape(rows, x.shape[-1])
    if trained:
        y = operator.apply(flat, weight, bias, strength, low_rank, *vectors)
    else:
        y = function(flat, weight, bias, vectors, strength, low_rank)[0]
    return y.view(*x.shape[:-1], len(weight))


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float = 1.0) -> Tensor:
    """`functional.adapt_weight`, in one pass over the weight where it is a matrix in one block; not rounded.

    Returns:
        The weight's shape, in float32 (float64).
    """
    accurate = weight.to(accurate_dtype(weight.dtype))
    if strength == 0:
        return accurate
    if weight.ndim == 2 and len(vectors.u) == 1:
        return adapted_weight_single_block(accurate, vectors, strength)
    return adapt_weight(accurate, vectors, strength)


def prefers_low_rank(rows: int, weight: Tensor) -> bool:
    """Whether the passes over activations cost less than those over the weight (memory traffic counts, not sums)."""
    outputs, inputs = weight.shape
    return rows * (outputs + inputs) < 2 * outputs * inputs
