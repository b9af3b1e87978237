"""The operator for a single block: every term is of rank 1, and all are handled together.

With the terms' rows stacked, W(α) = W + Σ_k f_k g_k x_kᵀ: X (r, i) = û, v̂, then H Wᵀũ, H Wᵀṽ; G (r, o) = Wû, Wv̂,
then ũ, ṽ. r is 4 for two-sided ETHER+; one-sided ETHER has an operator of its own. On a CPU a product of few rows with
xᵀ is up to three times faster than the same product of x with few columns, so everything of N entries is kept as
(r, N).

Axes: N rows of x, i inputs, o outputs, m vectors of a side (1 for ETHER, 2 for ETHER+).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.transforms import Vectors, accurate_dtype, normalize_backward, unit_and_length


class AdaptedLinear(torch.autograd.Function):
    """The arguments of `adapted_linear`, the four vectors flat and last -> y."""

    @staticmethod
    def forward(ctx, x, weight, bias, strength: float, low_rank: bool, *vectors: Tensor | None) -> Tensor:
        vectors = Vectors(*vectors)
        y, *saved = adapted_linear(x, weight, bias, vectors, strength, low_rank)
        ctx.save_for_backward(x, weight, *saved)
        ctx.factors = _factors(1 if vectors.v is None else 2, strength)
        return y.detach()  # as no view: PyTorch forbids to change a view that was made here in place

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows_x, rows_g, lengths, lengths_out, products = ctx.saved_tensors
        factors, m, low_rank = ctx.factors, len(ctx.factors), products is not None
        trained = any(ctx.needs_input_grad[5:])
        shape, x, g = x.shape, x.reshape(-1, x.shape[-1]), g.reshape(-1, len(weight))  # (N, i), (N, o)
        gx = grad_bias = None
        grads: list[Tensor | None] = [None] * 4
        with without_autocast(x.device.type):
            products_g = dot_any(rows_g, g) if trained or low_rank else None  # (r, N)
            if ctx.needs_input_grad[0]:
                if low_rank:
                    gx = _add_terms_(g @ weight.to(g.dtype), products_g, rows_x, factors)
                else:
                    gx = g @ _add_terms(weight.to(rows_x.dtype), rows_g, rows_x, factors).to(g.dtype)
                gx = gx.view(shape)
            if ctx.needs_input_grad[2]:
                grad_bias = g.sum(0)
            if trained:
                products = dot_any(rows_x, x) if products is None else products
                sums_x, sums_g = sum_any(products_g, x), sum_any(products, g)  # (r, i), (r, o)
                accurate = weight.to(rows_x.dtype)
                if lengths_out is None:
                    grads_u = sums_x + _dot(sums_g, accurate)
                else:
                    units, units_out = rows_x[:m], rows_g[m:]
                    # x(g·H̃Wû) from x(g·Wû) and x(g·ũ)
                    own = _add_dot(sums_x[:m], rows_g[:m], units_out, sums_x[m:])
                    grads_u = own + _dot(_transform(sums_g[:m], units_out), accurate)
                    outer = sums_g[m:] + _dot(_transform(sums_x[m:], units), accurate.T)
                    grads[2:] = _raw_gradients(units_out, lengths_out, outer, factors)
                grads[:2] = _raw_gradients(rows_x[:m], lengths, grads_u, factors)
        return gx, None, grad_bias, None, None, *grads


def adapted_weight(weight: Tensor, vectors: Vectors, strength: float) -> Tensor:
    """W(α) for one block, (o, i) in float32 (float64), written once."""
    with without_autocast(weight.device.type):
        accurate, rows_x, rows_g, *_ = _terms(weight, vectors)
        return _add_terms(accurate, rows_g, rows_x, _factors(1 if vectors.v is None else 2, strength))


def _terms(weight: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """W in float32 (float64), X (r, i), G (r, o), and the lengths of the raw vectors of both sides."""
    u, v, u_out, v_out = vectors
    accurate = weight.to(torch.promote_types(accurate_dtype(weight.dtype), u.dtype))
    units, lengths = unit_and_length(u if v is None else torch.cat((u, v)))
    rows_x, rows_g = units, _dot(units, accurate.T)
    if u_out is None:
        return accurate, rows_x, rows_g, lengths, None
    units_out, lengths_out = unit_and_length(u_out if v_out is None else torch.cat((u_out, v_out)))
    rows_x = torch.cat((units, _transform(_dot(units_out, accurate), units)))
    return accurate, rows_x, torch.cat((rows_g, units_out)), lengths, lengths_out


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Vectors, strength: float, low_rank: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (..., o) for x (..., i), and what its gradient needs: X, G, the lengths of raw vectors, low-rank: X xᵀ."""
    with without_autocast(x.device.type):
        accurate, rows_x, rows_g, lengths, lengths_out = _terms(weight, vectors)
        factors = _factors(1 if vectors.v is None else 2, strength)
        products, flat = None, x.reshape(-1, x.shape[-1])  # (N, i)
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        if low_rank:
            products = dot_any(rows_x, flat)  # (r, N)
            y = _add_terms_(F.linear(flat, weight.to(x.dtype), bias), products, rows_g, factors)
        else:
            y = F.linear(flat, _add_terms(accurate, rows_g, rows_x, factors).to(x.dtype), bias)
    return y.view(*x.shape[:-1], len(weight)), rows_x, rows_g, lengths, lengths_out, products


def without_autocast(device_type: str) -> AbstractContextManager:
    """Entering autocast's own context costs as much as a small product, so only where there is need."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _factors(m: int, strength: float) -> tuple[float, ...]:
    """α f of a side's terms."""
    return (-2 * strength,) if m == 1 else (-strength, strength)


def _scaled(rows: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Rows times their α f, those of a side after those of the other: (r, ·)."""
    scaled = rows * factors[-1]
    if len(factors) == 2:
        scaled[::2].neg_()
    return scaled


def _add_terms(base: Tensor, left: Tensor, right: Tensor, factors: tuple[float, ...]) -> Tensor:
    """base + Σ_k α f_k left_k ⊗ right_k: base (a, b), left (r, a), right (r, b)."""
    if len(left) == 1:
        return torch.addr(base, left[0], right[0], alpha=factors[0])
    return torch.addmm(base, left.T, _scaled(right, factors))


def _add_terms_(base: Tensor, left: Tensor, right: Tensor, factors: tuple[float, ...]) -> Tensor:
    """`_add_terms` in place, in the dtype of the base."""
    if len(left) == 1:
        return base.addr_(left[0].to(base.dtype), right[0].to(base.dtype), alpha=factors[0])
    return base.addmm_(left.T.to(base.dtype), _scaled(right, factors).to(base.dtype))


def _dot(rows: Tensor, columns: Tensor) -> Tensor:
    """(m, d) @ (d, e), one row at a time where that is a matrix-vector product."""
    return (columns.T @ rows[0]).unsqueeze(0) if len(rows) == 1 else rows @ columns


def dot_any(rows: Tensor, a: Tensor) -> Tensor:
    """rows · aᵀ, (r, N), in the dtype of the rows; a (N, d) of any dtype."""
    if a.dtype != rows.dtype and a.is_cuda:
        return torch.mm(rows.to(a.dtype), a.T, out_dtype=rows.dtype)
    return _dot(rows, a.to(rows.dtype).T)


def sum_any(products: Tensor, a: Tensor) -> Tensor:
    """products · a, (r, d), in the dtype of the products; a (N, d) of any dtype."""
    if a.dtype != products.dtype and a.is_cuda:
        return torch.mm(products.to(a.dtype), a, out_dtype=products.dtype)
    return _dot(products, a.to(products.dtype))


def _add_dot(rows: Tensor, left: Tensor, units: Tensor, right: Tensor) -> Tensor:
    """rows + Σ_j f_j (left·û_j) right_j: (m, ·)."""
    return _add_terms(rows, units @ left.T, right, _factors(len(units), 1.0))


def _transform(rows: Tensor, units: Tensor) -> Tensor:
    """rows T, T = I + Σ_j f_j û_j û_jᵀ: (m, d)."""
    return _add_dot(rows, rows, units, units)


def _raw_gradients(units: Tensor, lengths: Tensor, grads: Tensor, factors: tuple[float, ...]) -> list[Tensor | None]:
    """dL/dr of a side's one or two raw vectors, (1, d) each."""
    raw = normalize_backward(units, lengths, grads)
    return [raw[k : k + 1].mul_(factors[k]) if k < len(units) else None for k in range(2)]
