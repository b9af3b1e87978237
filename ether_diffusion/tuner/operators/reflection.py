"""The operator for the plainest case: ETHER in a single block.

W(α) = W − 2α (Wû) ûᵀ is one rank-1 update. On few rows the input is reflected, on many the weight is. Small layers
wait for the number of steps, not for the sums, so that this case has as few as there can be.

Axes: N rows of x, i inputs, o outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.packed import add_product, pack, raw_gradients, working_dtype
from ether_diffusion.tuner.operators.single_block import without_autocast
from ether_diffusion.tuner.transforms import Vectors


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., o) for x (..., i) and u (1, i); and what its gradient needs: û, |u|, and x·û on few rows, Wû on many."""
    with without_autocast(x.device.type):
        rows, lengths = pack(vectors, working_dtype(weight, vectors))
        unit = rows[0, : x.shape[-1]].to(x.dtype)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if not low_rank:
            along = torch.mv(weight, unit)  # (o,)
            return F.linear(x, torch.addr(weight, along, unit, alpha=-2 * strength), bias), unit, lengths, along
        flat = x.reshape(-1, len(unit))  # (N, i)
        along = torch.mv(flat, unit)  # (N,)
        y = F.linear(torch.addr(flat, along, unit, alpha=-2 * strength), weight, bias)
    return y.view(*x.shape[:-1], len(weight)), unit, lengths, along


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float) -> Tensor:
    """W(α) for one block, (o, i) in float32 (float64), written once."""
    with without_autocast(weight.device.type), torch.no_grad():
        dtype = working_dtype(weight, vectors)
        weight, unit = weight.to(dtype), pack(vectors, dtype)[0][0, : weight.shape[1]]
        return torch.addr(weight, torch.mv(weight, unit), unit, alpha=-2 * strength)


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        y, *saved = adapted_linear(x, weight, bias, Vectors(*vectors), strength, low_rank)
        ctx.save_for_backward(x, weight, *saved, vectors[0])
        ctx.factor, ctx.low_rank = -2 * strength, low_rank
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, unit, lengths, along, raw = ctx.saved_tensors
        (outputs, inputs), shape, factor = weight.shape, x.shape, ctx.factor
        x, g = x.reshape(-1, inputs), g.reshape(-1, outputs)  # (N, i), (N, o)
        grad_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        gx = grad_u = None
        with without_autocast(x.device.type):
            weight = weight.to(g.dtype)
            if ctx.low_rank:
                gx = g @ weight  # of the reflected input
                other = torch.mv(gx, unit)  # (N,)
                if ctx.needs_input_grad[5]:
                    grad_u = _sum(x, other, along.unsqueeze(0), gx, factor, lengths.dtype)
                gx = gx.addr_(other, unit, alpha=factor) if ctx.needs_input_grad[0] else None
            else:
                if ctx.needs_input_grad[0]:
                    gx = g @ torch.addr(weight, along, unit, alpha=factor)
                if ctx.needs_input_grad[5]:
                    through = torch.mv(g.T, torch.mv(x, unit)).unsqueeze(0)  # gᵀ(x·û), (1, o)
                    grad_u = _sum(x, torch.mv(g, along), through, weight, factor, lengths.dtype)
            if grad_u is not None:
                grad_u = raw_gradients(Vectors(raw), grad_u, None, lengths)[0]
        gx = None if gx is None else gx.view(shape)
        return gx, None, grad_bias, None, None, grad_u, None, None, None


def _sum(x: Tensor, of_x: Tensor, left: Tensor, right: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor · (Σ of_x x + left @ right): (1, i) for x (N, i), of_x (N,), left (1, k) and right (k, i)."""
    return add_product(torch.mv(x.T, of_x).unsqueeze(0), left, right, factor, dtype)
