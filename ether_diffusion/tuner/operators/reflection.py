"""The operator for the plainest case: ETHER in a single block.

W(α) = W − 2α (Wû) ûᵀ is one rank-1 update, and everything but x, y and W is a vector. Small layers wait for the number
of steps, not for the sums, so that this case has as few as there can be.

Axes: N rows of x, i inputs, o outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.single_block import dot_any, sum_any, without_autocast
from ether_diffusion.tuner.transforms import Vectors, accurate_dtype, normalize_backward, unit_and_length


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """y (..., o) for x (..., i) and u (1, i); and what its gradient needs: û, |u|, Wû, on the low-rank side x·û."""
    with without_autocast(x.device.type):
        accurate = weight.to(torch.promote_types(accurate_dtype(weight.dtype), vectors.u.dtype))
        unit, length = unit_and_length(vectors.u[0])  # (i,), (1,)
        along = torch.mv(accurate, unit)  # (o,)
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        if not low_rank:
            adapted = torch.addr(accurate, along, unit, alpha=-2 * strength).to(x.dtype)
            return F.linear(x, adapted, bias), unit, length, along, None
        y = F.linear(x, weight.to(x.dtype), bias)
        products = _project(x.reshape(-1, len(unit)), unit)
        y.view(-1, len(along)).addr_(products.to(y.dtype), along.to(y.dtype), alpha=-2 * strength)
        return y, unit, length, along, products


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        y, *saved = adapted_linear(x, weight, bias, Vectors(*vectors), strength, low_rank)
        ctx.save_for_backward(x, weight, *saved)
        ctx.factor = -2 * strength
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, unit, length, along, products = ctx.saved_tensors
        shape, low_rank, trained = x.shape, products is not None, ctx.needs_input_grad[5]
        x, g = x.reshape(-1, len(unit)), g.reshape(-1, len(along))  # (N, i), (N, o)
        gx = grad_bias = grad_u = None
        with without_autocast(x.device.type):
            products_g = _project(g, along) if trained or low_rank else None  # (N,)
            if ctx.needs_input_grad[0]:
                if low_rank:
                    gx = g @ weight.to(g.dtype)
                    gx.addr_(products_g.to(g.dtype), unit.to(g.dtype), alpha=ctx.factor)
                else:
                    gx = g @ torch.addr(weight.to(unit.dtype), along, unit, alpha=ctx.factor).to(g.dtype)
                gx = gx.view(shape)
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0)
            if trained:
                products = _project(x, unit) if products is None else products
                grad = torch.addmv(_gather(x, products_g), weight.to(unit.dtype).T, _gather(g, products))
                grad_u = normalize_backward(unit, length, grad).mul_(ctx.factor).unsqueeze(0)
        return gx, None, grad_bias, None, None, grad_u, None, None, None


def _project(a: Tensor, vector: Tensor) -> Tensor:
    """a·v for every row: (N, d) and (d,) to (N,), in the dtype of the vector."""
    return torch.mv(a, vector) if a.dtype == vector.dtype else dot_any(vector.unsqueeze(0), a).squeeze(0)


def _gather(a: Tensor, coefficients: Tensor) -> Tensor:
    """Σ c_k a_k over rows: (N, d) and (N,) to (d,), in the dtype of the coefficients."""
    return torch.mv(a.T, coefficients) if a.dtype == coefficients.dtype else sum_any(coefficients[None], a).squeeze(0)
