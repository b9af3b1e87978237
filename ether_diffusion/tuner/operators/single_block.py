"""The operator for a single block: a linear layer with the factors of its weight's change, y = x (W + α LᵀR)ᵀ + b.

The factors (see `factors`) are float32 in every dtype, and so are all sums over rows of x. Where a device multiplies
half precision into float32 (see `products`), the rows of a product with x are rounded to its dtype, and x is read as
it is. On a CPU a product of few rows with xᵀ is up to three times faster than the same product of x with few columns,
so everything of N entries is kept as (r, N).

Axes: N rows of x, i inputs, o outputs, r rows of the factors (1, 2 or 4).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.factors import Factors, make_factors, raw_gradients
from ether_diffusion.tuner.operators.products import (
    add_outer,
    add_outer_,
    as_operand,
    product,
    reads_half,
    rounded_update,
)
from ether_diffusion.tuner.transforms import Vectors


class Halves(NamedTuple):
    """Factors in half precision: r rows, rounded; or 3 r rows, whose product is LᵀR almost to float32.

    Of a row's rounded value h and the rest l, rounded as well, `right` then has h, l, h and `left` h, h, l.
    """

    right: Tensor  # (r or 3 r, i)
    left: Tensor  # (r or 3 r, o)


class LayerFactors(NamedTuple):
    """The factors of one layer."""

    right: Tensor  # R (r, i), float32 (float64)
    left: Tensor  # L (r, o)
    halves: Halves | None = None  # where x is multiplied in half precision

    def for_products(self) -> tuple[Tensor, Tensor]:
        """R and L as they are multiplied with x and g."""
        if self.halves is None:
            return self.right, self.left
        r = len(self.right)
        return self.halves.right[:r], self.halves.left[:r]


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, strength: float, low_rank: bool, factors: LayerFactors
) -> tuple[Tensor, Tensor | None]:
    """y (..., o) for x (..., i), and what its gradient needs on the low-rank side: R xᵀ, (r, N)."""
    with without_autocast(x.device.type):
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        if not low_rank:
            return F.linear(x, _adapted(weight, strength, factors, x.dtype), bias), None
        flat = x.reshape(-1, x.shape[-1])  # (N, i)
        y = F.linear(flat, weight.to(x.dtype), bias)
        right, left = factors.for_products()
        products = _products(right, as_operand(flat, factors.right.dtype), factors.right.dtype)
        add_outer_(y, products, left, strength)
    return y.view(*x.shape[:-1], len(weight)), products


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float) -> Tensor:
    """W(α) for one block, (o, i) in the dtype of the weight, float32 or float64, written once."""
    with without_autocast(weight.device.type):
        right, left, *_ = make_factors([weight], [vectors])
        return add_outer(weight.to(right.dtype), left[0], right[0], strength)


def one_layer(x: Tensor, right: Tensor, left: Tensor) -> LayerFactors:
    """Factors (1, r, ·) of one layer, as it reads them for an input."""
    right, left = right[0], left[0]
    if not reads_half(x, right.dtype):
        return LayerFactors(right, left)
    return LayerFactors(right, left, Halves(right.to(x.dtype), left.to(x.dtype)))


def own_factors(x: Tensor, weight: Tensor, vectors: Vectors) -> tuple[LayerFactors, Factors]:
    """The factors of one layer for an input, and as they were made."""
    with without_autocast(x.device.type):
        made = make_factors([weight], [vectors])
        return one_layer(x, made.right, made.left), made


class FactoredLinear(torch.autograd.Function):
    """(x, weight, bias, strength, low_rank, halves, right, left) -> y, with factors that were made outside."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, halves: Halves | None, right, left) -> Tensor:
        y, products = adapted_linear(x, weight, bias, strength, low_rank, LayerFactors(right, left, halves))
        ctx.save_for_backward(x, weight, right, left, products, *(halves or (None, None)))
        ctx.strength = strength
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, right, left, products, *halves = ctx.saved_tensors
        factors = LayerFactors(right, left, None if halves[0] is None else Halves(*halves))
        needs = (*ctx.needs_input_grad[:3:2], any(ctx.needs_input_grad[6:]))
        gx, grad_bias, *grads = _gradients(x, weight, g, ctx.strength, factors, products, needs)
        return gx, None, grad_bias, None, None, None, *grads


class AdaptedLinear(torch.autograd.Function):
    """(x, weight, bias, strength, low_rank, the four vectors) -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        factors, made = own_factors(x, weight, Vectors(*vectors))
        y, products = adapted_linear(x, weight, bias, strength, low_rank, factors)
        ctx.save_for_backward(x, weight, products, *made[:4])
        ctx.strength = strength
        return y.detach()  # as above

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, products, right, left, *lengths = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3:2], any(ctx.needs_input_grad[5:]))
        factors = one_layer(x, right, left)
        gx, grad_bias, *grads = _gradients(x, weight, g, ctx.strength, factors, products, needs)
        found: list[Tensor | None] = [None] * 4
        if needs[2]:
            with without_autocast(x.device.type):
                (raws,) = raw_gradients([weight], Factors(right, left, *lengths), *(each[None] for each in grads))
            m = len(raws) if lengths[1] is None else len(raws) // 2
            for k, raw in enumerate(raws):
                found[k if k < m else 2 + k - m] = raw
        return gx, None, grad_bias, None, None, *found


def _gradients(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    strength: float,
    factors: LayerFactors,
    products: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the bias and of R and L, as far as they are needed; `products` on the low-rank side."""
    shape, x, g = x.shape, x.reshape(-1, x.shape[-1]), g.reshape(-1, len(weight))  # (N, i), (N, o)
    gx = grad_right = grad_left = None
    right, left = factors.for_products()
    dtype, low_rank, trained = factors.right.dtype, products is not None, needs[2]
    with without_autocast(x.device.type):
        if trained or low_rank:
            read_g = as_operand(g, dtype)
            products_g = _products(left, read_g, dtype)
        if needs[0]:
            if low_rank:
                gx = add_outer_(g @ weight.to(g.dtype), products_g, right, strength)
            else:
                gx = g @ _adapted(weight, strength, factors, g.dtype)
            gx = gx.view(shape)
        if trained:
            read_x = as_operand(x, dtype)
            products = _products(right, read_x, dtype) if products is None else products
            grad_right, grad_left = product(products_g, read_x, dtype), product(products, read_g, dtype)
            if strength != 1:
                grad_right, grad_left = grad_right.mul_(strength), grad_left.mul_(strength)
    return gx, g.sum(0) if needs[1] else None, grad_right, grad_left


def _products(rows: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """rows · aᵀ, (r, N), as the next product with `a` takes them; a (N, d) from `as_operand`."""
    return product(rows, a.T, dtype).to(a.dtype)


def _adapted(weight: Tensor, strength: float, factors: LayerFactors, dtype: torch.dtype) -> Tensor:
    """W(α), summed in float32 (float64) and rounded once to `dtype`."""
    right, left, halves = factors
    if halves is not None and len(halves.right) > len(right):
        return rounded_update(weight, halves.left, halves.right, strength)
    return add_outer(weight.to(right.dtype), left, right, strength).to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Entering autocast's own context costs as much as a small product, so only where there is need."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
