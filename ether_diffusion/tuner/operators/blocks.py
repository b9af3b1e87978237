"""The operator for several blocks: terms of rank n, block rows kept as blocks.

Axes: N rows of x, i inputs, o outputs, n blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.transforms import (
    Transform,
    Vectors,
    accurate_dtype,
    add_along,
    gather,
    normalize_backward,
    project,
    unit_and_length,
)


class _Term(NamedTuple):
    """f GᵀX, of rank n. `x` and `g` are rows (n, ·), or blocks (n, ·/n) of block rows."""

    x: Tensor
    g: Tensor
    length: Tensor  # of the raw vector, (n, 1)
    factor: float
    on_input: bool  # the side of the raw vector: there its unit vectors are the blocks, on the other side are rows


def _terms(weight: Tensor, vectors: Vectors, strength: float) -> list[_Term]:
    """The terms of W(α) − W, input side first. All in float32 (float64)."""
    u, v, u_out, v_out = vectors
    accurate = weight.to(torch.promote_types(accurate_dtype(weight.dtype), u.dtype))
    factors = (-2.0,) if v is None else (-1.0, 1.0)
    terms = []
    for raw, factor in zip((u, v), factors, strict=False):
        unit, length = unit_and_length(raw)
        terms.append(_Term(unit, project(accurate, unit).T, length, strength * factor, True))
    if u_out is not None:
        side = Transform(tuple(term.x for term in terms), factors)
        for raw, factor in zip((u_out, v_out), factors, strict=False):
            unit, length = unit_and_length(raw)
            rows = side.apply(project(accurate.T, unit).T)
            terms.append(_Term(rows, unit, length, strength * factor, False))
    return terms


def _products(a: Tensor, rows: list[Tensor], blocks: list[bool]) -> list[Tensor]:
    """a·rᵀ for every rows (n, d) or blocks (n, d/n), (N, n) each, in their dtype; a (N, d) of any dtype."""
    a = a.to(rows[0].dtype)
    return [project(a, r) if block else a @ r.T for r, block in zip(rows, blocks, strict=True)]


def _sums(a: Tensor, coefficients: list[Tensor], blocks: list[bool]) -> list[Tensor]:
    """Σ_N c a: rows (n, d) for coefficients (N, n), or blocks (n, d/n). The transpose of `_products`."""
    a = a.to(coefficients[0].dtype)
    return [gather(a, c, c.shape[1]) if block else c.T @ a for c, block in zip(coefficients, blocks, strict=True)]


def _add(
    y: Tensor, coefficients: list[Tensor], rows: list[Tensor], blocks: list[bool], factors: list[float]
) -> Tensor:
    """y + Σ f c r: y (N, d), coefficients (N, n), rows (n, d) or blocks (n, d/n)."""
    total = y.to(rows[0].dtype)  # so that it is rounded once
    for c, r, block, factor in zip(coefficients, rows, blocks, factors, strict=True):
        total = add_along(total, c, r, factor) if block else torch.addmm(total, c, r, alpha=factor)
    return total.to(y.dtype)


def _updated(weight: Tensor, terms: list[_Term], dtype: torch.dtype) -> Tensor:
    """W(α), computed in float32 (float64) and rounded once to `dtype`."""
    accurate = weight.to(terms[0].x.dtype)
    for term in terms:
        if term.on_input:
            accurate = add_along(accurate, term.g.T, term.x, term.factor)
        else:
            accurate = add_along(accurate.T, term.x.T, term.g, term.factor).T
    return accurate.to(dtype)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, list[_Term], list[Tensor]]:
    """y (..., o) for x (..., i), and what its gradient needs: the terms, and on the low-rank side x Xᵀ of each."""
    with torch.autocast(x.device.type, enabled=False):
        terms, flat = _terms(weight, vectors, strength), x.reshape(-1, x.shape[-1])  # (N, i)
        bias = None if bias is None else bias.to(x.dtype)
        products = []
        if low_rank:
            on_input = [term.on_input for term in terms]
            products = _products(flat, [term.x for term in terms], on_input)
            y = F.linear(flat, weight.to(x.dtype), bias)
            y = _add(y, products, [t.g for t in terms], [not b for b in on_input], [t.factor for t in terms])
        else:
            y = F.linear(flat, _updated(weight, terms, x.dtype), bias)
    return y.view(*x.shape[:-1], len(weight)), terms, products


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        y, terms, products = adapted_linear(x, weight, bias, Vectors(*vectors), strength, low_rank)
        ctx.save_for_backward(x, weight, *(tensor for term in terms for tensor in term[:3]), *products)
        ctx.kinds, ctx.low_rank, ctx.strength = [term[3:] for term in terms], low_rank, strength
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        terms = [_Term(*saved[3 * k : 3 * k + 3], *kind) for k, kind in enumerate(ctx.kinds)]
        products = saved[3 * len(terms) :]
        on_input = [term.on_input for term in terms]
        off_input = [not b for b in on_input]
        gx = grad_bias = None
        grads: list[Tensor | None] = [None] * 4
        trained = any(ctx.needs_input_grad[5:])
        shape, x, g = x.shape, x.reshape(-1, x.shape[-1]), g.reshape(-1, len(weight))  # (N, i), (N, o)
        with torch.autocast(x.device.type, enabled=False):
            if trained or ctx.low_rank:
                products_g = _products(g, [term.g for term in terms], off_input)  # g·Gᵀ, (N, n) each
            if ctx.needs_input_grad[0]:
                if ctx.low_rank:
                    factors = [term.factor for term in terms]
                    gx = _add(g @ weight.to(g.dtype), products_g, [t.x for t in terms], on_input, factors)
                else:
                    gx = g @ _updated(weight, terms, g.dtype)
                gx = gx.view(shape)
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0)
            if trained:
                products = products or _products(x, [term.x for term in terms], on_input)
                found = _vector_gradients(x, g, weight, terms, products, products_g, ctx.strength)
                of_input = [grad for grad, b in zip(found, on_input, strict=True) if b]
                of_output = [grad for grad, b in zip(found, on_input, strict=True) if not b]
                grads[: len(of_input)], grads[2 : 2 + len(of_output)] = of_input, of_output
        return gx, None, grad_bias, None, None, *grads


def _vector_gradients(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    terms: list[_Term],
    products_x: list[Tensor],
    products_g: list[Tensor],
    strength: float,
) -> list[Tensor]:
    """dL/dr of every term's raw vector, from products of x and g with rows alone.

    Input side, with C = H̃W: dL/dû = α f [Σ x (g·Cû) + Wᵀ H̃ (gᵀ(x·û))].
    Output side, with M = WH: dL/dũ = α f [Σ g (x·Mᵀũ) + W H (xᵀ(g·ũ))].
    """
    on_input = [term.on_input for term in terms]
    inner, outer = ([term for term in terms if term.on_input is b] for b in (True, False))
    factors = tuple(term.factor / strength for term in inner)
    through = list(products_g)
    for k, term in enumerate(inner):  # g·Cû = g·Wû + Σ f̃ (g·ũ)(ũ·Wû)
        for j, (other, factor) in enumerate(zip(outer, factors, strict=False), start=len(inner)):
            through[k] = through[k] + factor * products_g[j] @ project(term.g, other.g).T
    sums_x = _sums(x, through, on_input)  # blocks for the input side, rows xᵀ(g·ũ) for the output side
    sums_g = _sums(g, products_x, [not b for b in on_input])  # rows gᵀ(x·û) for the input side, blocks for the other
    accurate = weight.to(terms[0].x.dtype)
    input_side = Transform(tuple(term.x for term in inner), factors)
    output_side = Transform(tuple(term.g for term in outer), factors[: len(outer)])
    grads = []
    for term, sum_x, sum_g in zip(terms, sums_x, sums_g, strict=True):
        n = len(term.length)
        if term.on_input:
            unit, grad = term.x, sum_x + gather(accurate, output_side.apply(sum_g).T, n)
        else:
            unit, grad = term.g, sum_g + gather(accurate.T, input_side.apply(sum_x).T, n)
        grads.append(normalize_backward(unit, term.length, term.factor * grad))
    return grads
