"""The operator for ETHER+ in a single block: every term is of rank 1, and all are handled together.

With the terms' rows one below the other, W(α) = W + α GᵀX: X (r, i) = −û, v̂, H Wᵀṽ, H Wᵀũ and G (r, o) = Wû, Wv̂, ṽ,
−ũ, where ũ and ṽ are unit vectors of the output side; r is 4, or 2 without an output side. On a CPU a product of few
rows with xᵀ is up to three times faster than the same product of x with few columns, so everything of N entries is
kept as (r, N).

Axes: N rows of x, i inputs, o outputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.packed import add_product, pack, raw_gradients, working_dtype, write_product
from ether_diffusion.tuner.transforms import Vectors

SPARE = 4
"""Rows between the two sides' vectors, for those of X and G that are products with the weight."""


class _Terms(NamedTuple):
    """What W(α) is made of, in the dtype that is computed in."""

    x: Tensor  # û and below it X
    g: Tensor  # G and below it, where there is an output side, ũ
    back: Tensor | None  # Wᵀṽ, Wᵀũ, (2, i)
    crossed: Tensor | None  # ũ·Wû of every pair, those of the output side down

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Gᵀ and X."""
        return self.g[:4].T, self.x[1:]


def _terms(weight: Tensor, rows: Tensor, two_sided: bool) -> _Terms:
    """rows: as from `pack`, with SPARE, which are written here."""
    outputs, inputs = weight.shape
    units = rows[:3:2, :inputs]
    if not two_sided:
        return _Terms(rows[:, :inputs], units @ weight.T, None, None)
    write_product(rows[5:7, :outputs], units, weight.T)
    back = rows[7::2, :outputs] @ weight
    crossed = back @ units.T
    write_product(rows[3:5, :inputs], crossed, rows[1:3, :inputs], back)
    return _Terms(rows[:5, :inputs], rows[5:, :outputs], back, crossed)


def _packed(weight: Tensor, vectors: Vectors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, lengths = pack(vectors, working_dtype(weight, vectors), SPARE)
    return rows.to(dtype), lengths


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float) -> Tensor:
    """W(α) for one block, (o, i) in float32 (float64), written once."""
    with without_autocast(weight.device.type), torch.no_grad():
        dtype = working_dtype(weight, vectors)
        terms = _terms(weight.to(dtype), _packed(weight, vectors, dtype)[0], vectors.u_out is not None)
        return torch.addmm(weight.to(dtype), *terms.factors, alpha=strength)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, _Terms, Tensor, Tensor | None]:
    """y (..., o) for x (..., i); and what its gradient needs: the terms, the lengths of rows, low-rank: those · xᵀ."""
    with without_autocast(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        rows, lengths = _packed(weight, vectors, x.dtype)
        terms, products = _terms(weight, rows, vectors.u_out is not None), None
        flat = x.reshape(-1, x.shape[-1])  # (N, i)
        if low_rank:
            products = terms.x @ flat.T
            y = F.linear(flat, weight, bias).addmm_(products[1:].T, terms.g[:4], alpha=strength)
        else:
            y = F.linear(flat, torch.addmm(weight, *terms.factors, alpha=strength), bias)
    return y.view(*x.shape[:-1], len(weight)), terms, lengths, products


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        y, terms, lengths, products = adapted_linear(x, weight, bias, Vectors(*vectors), strength, low_rank)
        ctx.save_for_backward(x, weight, *terms, lengths, products, *vectors)
        ctx.strength = strength
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *terms, lengths, products, u, v, u_out, v_out = ctx.saved_tensors
        terms, vectors, strength = _Terms(*terms), Vectors(u, v, u_out, v_out), ctx.strength
        trained, low_rank = any(ctx.needs_input_grad[5:]), products is not None
        (outputs, inputs), shape = weight.shape, x.shape
        x, g = x.reshape(-1, inputs), g.reshape(-1, outputs)  # (N, i), (N, o)
        gx, grad_bias = None, g.sum(0) if ctx.needs_input_grad[2] else None
        grads: list[Tensor | None] = [None] * 4
        with without_autocast(x.device.type):
            weight = weight.to(g.dtype)
            products_g = terms.g @ g.T if trained or low_rank else None
            if ctx.needs_input_grad[0]:
                if low_rank:
                    gx = (g @ weight).addmm_(products_g[:4].T, terms.x[1:], alpha=strength)
                else:
                    gx = g @ torch.addmm(weight, *terms.factors, alpha=strength)
                gx = gx.view(shape)
            if trained:
                products = terms.x @ x.T if products is None else products
                found = _unit_gradients(weight, terms, products, products_g, x, g, strength, lengths.dtype)
                grads = raw_gradients(vectors, *found, lengths, SPARE)
        return gx, None, grad_bias, None, None, *grads


def _unit_gradients(
    weight: Tensor,
    terms: _Terms,
    products: Tensor,
    products_g: Tensor,
    x: Tensor,
    g: Tensor,
    strength: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """α dL/dû up to its factor f, of the input side's and of the output side's vectors.

    Input side, with C = H̃W: Σ x (g·Cû) + Cᵀ (gᵀ(x·û)). Output side, with M = WH: Σ g (x·Mᵀũ) + M (xᵀ(g·ũ)).
    """
    sums_x = products_g @ x
    if terms.crossed is None:
        return add_product(sums_x, products[::2] @ g, weight, strength, dtype), None
    sums_g = products @ g
    own = sums_x[:2].addmm_(terms.crossed.T, sums_x[2:4])  # g·Cû from g·Wû and g·ũ
    after_input = torch.addmm(weight, terms.g[:2].T, terms.x[1:3])  # M
    before_output = torch.addmm(weight, terms.g[2:4].T, terms.back)  # C
    of_input = add_product(own, sums_g[:3:2], before_output, strength, dtype)
    return of_input, add_product(sums_g[3:], sums_x[2::2], after_input.T, strength, dtype)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Entering autocast's own context costs as much as a small product, so only where there is need."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
