"""The operator of ETHER+ for few rows, in a single block: y = H̃ W H x as it is written, from right to left.

Input, product and output are transformed by two skinny products each; no weight is read but for its own product.

Axes: N rows of x, i inputs, o outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.packed import add_product, pack, raw_gradients, working_dtype, write_product
from ether_diffusion.tuner.operators.single_block import without_autocast
from ether_diffusion.tuner.transforms import Vectors


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """y (..., o) for x (..., i) at strength 1; and what its gradient needs: the packed rows in the dtype of x, their
    lengths, and the products of unit vectors with x and with its product, (2, N) each."""
    inputs, outputs = x.shape[-1], len(weight)
    with without_autocast(x.device.type):
        rows, lengths = pack(vectors, working_dtype(weight, vectors))
        rows, flat = rows.to(x.dtype), x.reshape(-1, inputs)  # (N, i)
        bias = None if bias is None else bias.to(x.dtype)
        along = rows[:3:2, :inputs] @ flat.T
        moved = torch.addmm(flat, along.T, rows[1:3, :inputs])
        y = F.linear(moved, weight.to(x.dtype), bias)
        along_out = None
        if vectors.u_out is not None:
            units = rows[3::2, :outputs]
            if bias is None:
                along_out = units @ y.T
            else:  # the bias is not transformed
                along_out = torch.addmm(torch.mv(units, bias).unsqueeze(1), units, y.T, beta=-1)
            y.addmm_(along_out.T, rows[3:5, :outputs])
    return y.view(*x.shape[:-1], outputs), rows, lengths, along, along_out


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        y, *saved = adapted_linear(x, weight, bias, Vectors(*vectors), strength, low_rank)
        ctx.save_for_backward(x, weight, *saved, *vectors)
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, lengths, along, along_out, *vectors = ctx.saved_tensors
        vectors, trained = Vectors(*vectors), any(ctx.needs_input_grad[5:])
        (outputs, inputs), shape = weight.shape, x.shape
        x, g = x.reshape(-1, inputs), g.reshape(-1, outputs)  # (N, i), (N, o)
        grad_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        grads: list[Tensor | None] = [None] * 4
        with without_autocast(x.device.type):
            weight, terms = weight.to(g.dtype), rows[1:3, :inputs]
            # Products of unit vectors with gradients, first of the input side: one tensor, so that x is read once.
            products = g.new_empty(2 if along_out is None else 4, len(g))
            through = g  # the gradient of W H x
            if along_out is not None:
                write_product(products[2:], rows[3::2, :outputs], g.T)
                through = torch.addmm(g, products[2:].T, rows[3:5, :outputs])
            gx = through @ weight  # of H x
            write_product(products[:2], rows[:3:2, :inputs], gx.T)
            if trained:
                sums = products @ x  # (2 or 4, i)
                of_input, of_output = add_product(sums[:2], along, gx, 1.0, lengths.dtype), None
                if along_out is not None:
                    moved = sums[2:].addmm_(products[2:] @ along.T, terms)  # Σ H x (g·ũ), without H x
                    of_output = add_product(along_out @ g, moved, weight.T, 1.0, lengths.dtype)
                grads = raw_gradients(vectors, of_input, of_output, lengths)
            gx = gx.addmm_(products[:2].T, terms).view(shape) if ctx.needs_input_grad[0] else None
        return gx, None, grad_bias, None, None, *grads
