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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import Transform, accurate_dtype, add_along, gather, normalize_backward, project

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
                    unit, factor, n = transform.units[k], transform.factors[k], len(raw)
                    along = gather(x, project(g, unit), n) + gather(g, project(x, unit), n)
                    grads[k] = normalize_backward(raw, factor * along)
        return gx, *grads


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor | None = None,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
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
        u, v, u_out, v_out: raw vectors, as for `functional.adapt_weight`; float32.
        strength: α, not 0.
        form: "weight" or "low_rank"; default: the cheaper one.

    Returns:
        (..., o), in the dtype that `torch.nn.functional.linear` would give.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = math.prod(x.shape[:-1])
    low_rank = form == "low_rank" or (form is None and prefers_low_rank(rows, weight, len(u)))
    y = _AdaptedLinear.apply(x.reshape(rows, x.shape[-1]), weight, bias, u, v, u_out, v_out, strength, low_rank)
    return y.view(*x.shape[:-1], len(weight))


def prefers_low_rank(rows: int, weight: Tensor, blocks: int) -> bool:
    """Whether the passes over activations cost less than those over the weight (memory traffic counts, not sums)."""
    outputs, inputs = weight.shape
    return rows * (outputs + inputs) < 2 * outputs * inputs


class _Term(NamedTuple):
    """f GᵀX, of rank n. `x` and `g` are rows (n, ·), or blocks (n, ·/n) of block rows."""

    x: Tensor
    g: Tensor
    factor: float
    raw: Tensor  # (n, ·/n): what is trained
    on_input: bool  # the side of the raw vector: its rows are blocks, the others dense


def _terms(weight: Tensor, vectors: tuple[Tensor | None, ...], strength: float) -> tuple[list[_Term], list[Transform]]:
    """The terms of W(α) − W, input side first, and the sides' transforms. All in float32 (float64)."""
    u, v, u_out, v_out = vectors
    dtype = torch.promote_types(accurate_dtype(weight.dtype), u.dtype)
    accurate = weight.to(dtype)
    sides = [Transform.of(u, v, dtype)]
    terms = [
        _Term(unit, project(accurate, unit).T, strength * factor, raw, True)
        for unit, factor, raw in zip(sides[0].units, sides[0].factors, (u, v))  # noqa: B905
    ]
    if u_out is not None:
        sides.append(Transform.of(u_out, v_out, dtype))
        terms += [
            _Term(sides[0].apply(project(accurate.T, unit).T), unit, strength * factor, raw, False)
            for unit, factor, raw in zip(sides[1].units, sides[1].factors, (u_out, v_out))  # noqa: B905
        ]
    return terms, sides


def _products(a: Tensor, rows: list[Tensor], blocks: list[bool]) -> list[Tensor]:
    """a·r for every row, (N, n) each, in the dtype of the rows; a (N, d) of any dtype."""
    n = len(rows[0])
    if n > 1 or a.dtype == rows[0].dtype:
        a = a.to(rows[0].dtype)
        return [project(a, r) if block or n == 1 else a @ r.T for r, block in zip(rows, blocks, strict=True)]
    stacked = torch.cat(rows)  # (c, d)
    if a.is_cuda:
        together = torch.mm(a, stacked.T.to(a.dtype), out_dtype=stacked.dtype)
    else:
        together = a.to(stacked.dtype) @ stacked.T
    return list(together.split(1, dim=1))


def _sums(a: Tensor, coefficients: list[Tensor], blocks: list[bool]) -> list[Tensor]:
    """Σ_N c a: rows (n, d) for coefficients (N, n), or blocks (n, d/n). The transpose of `_products`."""
    n = coefficients[0].shape[1]
    if n > 1 or a.dtype == coefficients[0].dtype:
        a = a.to(coefficients[0].dtype)
        return [gather(a, c, n) if block or n == 1 else c.T @ a for c, block in zip(coefficients, blocks, strict=True)]
    stacked = torch.cat(coefficients, dim=1)  # (N, c)
    if a.is_cuda:
        together = torch.mm(stacked.T.to(a.dtype), a, out_dtype=stacked.dtype)
    else:
        together = stacked.T @ a.to(stacked.dtype)
    return list(together.split(1))


def _add(
    y: Tensor, coefficients: list[Tensor], rows: list[Tensor], blocks: list[bool], factors: list[float]
) -> Tensor:
    """y + Σ f c r: y (N, d), coefficients (N, n), rows (n, d) or blocks (n, d/n)."""
    if len(rows[0]) == 1:
        stacked = torch.cat([f * r for f, r in zip(factors, rows, strict=True)])
        return torch.addmm(y, torch.cat(coefficients, dim=1).to(y.dtype), stacked.to(y.dtype))
    total = y.to(rows[0].dtype)  # so that it is rounded once
    for c, r, block, factor in zip(coefficients, rows, blocks, factors, strict=True):
        total = add_along(total, c, r, factor) if block else torch.addmm(total, c, r, alpha=factor)
    return total.to(y.dtype)


def _updated(weight: Tensor, terms: list[_Term], dtype: torch.dtype) -> Tensor:
    """W(α), computed in float32 (float64) and rounded once to `dtype`."""
    accurate = weight.to(terms[0].x.dtype)
    if len(terms[0].x) == 1:
        return torch.addmm(accurate, torch.cat([t.factor * t.g for t in terms]).T, torch.cat([t.x for t in terms])).to(
            dtype
        )
    for term in terms:
        if term.on_input:
            accurate = add_along(accurate, term.g.T, term.x, term.factor)
        else:
            accurate = add_along(accurate.T, term.x.T, term.g, term.factor).T
    return accurate.to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, u, v, u_out, v_out, strength: float, low_rank: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            terms, _ = _terms(weight, (u, v, u_out, v_out), strength)
            bias = None if bias is None else bias.to(x.dtype)
            kept: list[Tensor] = []
            if low_rank:
                on_input = [term.on_input for term in terms]
                kept = _products(x, [term.x for term in terms], on_input)
                y = F.linear(x, weight.to(x.dtype), bias)
                y = _add(y, kept, [t.g for t in terms], [not b for b in on_input], [t.factor for t in terms])
            else:
                y = F.linear(x, _updated(weight, terms, x.dtype), bias)
        ctx.save_for_backward(x, weight, u, v, u_out, v_out, *kept)
        ctx.strength, ctx.low_rank = strength, low_rank
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Gradients:
        x, weight, u, v, u_out, v_out, *kept = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            terms, sides = _terms(weight, (u, v, u_out, v_out), ctx.strength)
            on_input = [term.on_input for term in terms]
            off_input = [not b for b in on_input]
            factors = [term.factor for term in terms]
            gx = grad_bias = None
            trained = any(ctx.needs_input_grad[3:7])
            if trained or ctx.low_rank:
                at_g = _products(g, [term.g for term in terms], off_input)  # g·Gᵀ, (N, n) each
            if ctx.needs_input_grad[0]:
                if ctx.low_rank:
                    gx = _add(g @ weight.to(g.dtype), at_g, [t.x for t in terms], on_input, factors)
                else:
                    gx = g @ _updated(weight, terms, g.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0)
            grads = _vector_gradients(x, g, weight, terms, sides, kept, at_g) if trained else [None] * len(terms)
        names = [raw is not None for raw in (u, v, u_out, v_out)]
        spread = iter(grads)
        return gx, None, grad_bias, *(next(spread) if there else None for there in names), None, None


def _vector_gradients(x, g, weight, terms, sides, at_x, at_g) -> list[Tensor]:
    """dL/dr of every term's raw vector. With the dense gᵀx = Γ, dL/dû = f (Γ'ᵀ C û + Cᵀ Γ' û)…, from products alone.

    Input side, C = H̃W: f [Σ x (g·Cû) + Wᵀ H̃ (gᵀ(x·û))]. Output side, M = WH: f [Σ g (x·Mᵀũ) + W H (xᵀ(g·ũ))].
    """
    on_input = [term.on_input for term in terms]
    off_input = [not b for b in on_input]
    at_x = at_x or _products(x, [term.x for term in terms], on_input)
    # g·Cû = g·Wû + Σ f̃ (g·ũ)(ũ·Wû)
    through = list(at_g)
    if len(sides) == 2:
        outer = [k for k, b in enumerate(on_input) if not b]
        for k, b in enumerate(on_input):
            if b:
                for l, factor in zip(outer, sides[1].factors, strict=True):  # noqa: E741
                    through[k] = through[k] + factor * at_g[l] @ project(terms[k].g, terms[l].g).T
    sums_x = _sums(x, through, on_input)  # blocks for the input side, rows xᵀ(g·ũ) for the output side
    sums_g = _sums(g, at_x, off_input)  # rows gᵀ(x·û) for the input side, blocks for the output side
    accurate = weight.to(terms[0].x.dtype)
    grads = []
    for term, sum_x, sum_g in zip(terms, sums_x, sums_g, strict=True):
        n = len(term.raw)
        if term.on_input:
            rows = sides[1].apply(sum_g) if len(sides) == 2 else sum_g
            grad = sum_x + gather(accurate, rows.T, n)
        else:
            grad = sum_g + gather(accurate.T, sides[0].apply(sum_x).T, n)
        grads.append(normalize_backward(term.raw, term.factor * grad))
    return grads
