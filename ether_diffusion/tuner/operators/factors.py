"""The change of a weight as low-rank factors, W(α) − W = α LᵀR, for one layer or for many of a shape at once.

With the unit vectors of the input side as rows U (m, i), those of the output side Q (m, o), and F = diag(f) with
f = −2 for ETHER, −1 and 1 for ETHER+:

- the input side alone: R = F U, L = U Wᵀ;
- both sides: R stacks F U and M H, L stacks U Wᵀ and F Q, where M = Q W, and M H = M + C F U with C = M Uᵀ.

So a layer computes what a LoRA of rank r = m or 2m computes, and the gradients of L and R become those of the raw
vectors here. What touches a weight is a product of m rows with it; all else is vectors, handled for all layers
together. On a GPU a layer waits for the number of operations, not for their sums.

Axes: l layers of a shape, i inputs, o outputs, m vectors of a side (1 for ETHER, 2 for ETHER+).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ether_diffusion.tuner.operators.products import write, write_dot
from ether_diffusion.tuner.transforms import Vectors, accurate_dtype, normalize_backward, raw_lengths


class Factors(NamedTuple):
    """The factors of l layers, and what the gradient of raw vectors needs beside them; all in float32 (float64)."""

    right: Tensor  # (l, r, i)
    left: Tensor  # (l, r, o)
    lengths: Tensor  # |r| of the raw vectors of the input side, (l, m, 1)
    lengths_out: Tensor | None = None  # of the output side, likewise
    crossed: Tensor | None = None  # C, (l, m, m)


def make_factors(weights: Sequence[Tensor], vectors: Sequence[Vectors]) -> Factors:
    """The factors of layers of one shape, dtype and method, each with a single block."""
    first, (outputs, inputs) = vectors[0], weights[0].shape
    m = 1 if first.v is None else 2
    r = m if first.u_out is None else 2 * m
    dtype = torch.promote_types(accurate_dtype(weights[0].dtype), accurate_dtype(first.u.dtype))
    right = first.u.new_empty(len(vectors), r, inputs, dtype=dtype)
    left = first.u.new_empty(len(vectors), r, outputs, dtype=dtype)
    units, along = right[:, :m], left[:, :m]
    lengths = _write_units(units, [(each.u, each.v) for each in vectors])
    if first.u_out is None:
        for k, weight in enumerate(weights):
            write_dot(along[k], units[k], weight.to(dtype).T)
        _apply_signs_(units)
        return Factors(right, left, lengths)
    through, units_out = right[:, m:], left[:, m:]
    lengths_out = _write_units(units_out, [(each.u_out, each.v_out) for each in vectors])
    for k, weight in enumerate(weights):
        accurate = weight.to(dtype)
        write_dot(along[k], units[k], accurate.T)
        write_dot(through[k], units_out[k], accurate)  # M
    crossed = torch.bmm(units_out, along.mT)
    _apply_signs_(units)
    _apply_signs_(units_out)
    through.baddbmm_(crossed, units)  # M H
    return Factors(right, left, lengths, lengths_out, crossed)


def raw_gradients(
    weights: Sequence[Tensor], factors: Factors, grad_right: Tensor, grad_left: Tensor
) -> list[tuple[Tensor, ...]]:
    """dL/dr of the raw vectors of every layer, u (v) and u_out (v_out), (1, ·) each; the gradients are written over.

    grad_right: (l, r, i) and grad_left: (l, r, o), those of the factors.
    """
    right, left, lengths, lengths_out, crossed = factors
    m = lengths.shape[1]
    units, grad_units, grad_along = right[:, :m], grad_right[:, :m], grad_left[:, :m]
    if lengths_out is None:
        _apply_signs_(grad_units)
        sums = torch.empty_like(units)
        for k, weight in enumerate(weights):
            write_dot(sums[k], grad_along[k], weight.to(right.dtype))
        return _per_layer(_normalize_backward(units, lengths, sums.add_(grad_units)))
    through, grad_through, units_out, grad_out = right[:, m:], grad_right[:, m:], left[:, m:], grad_left[:, m:]
    if crossed is None:
        crossed = torch.bmm(units_out, left[:, :m].mT)
        _apply_signs_(crossed)
    mixed = torch.bmm(grad_through, units.mT)  # d(M H) Uᵀ
    _apply_signs_(mixed.mT)
    straight = torch.baddbmm(through, crossed, units, alpha=-1)  # M
    grad_straight = torch.baddbmm(grad_through, mixed, units)
    grad_units.baddbmm_(crossed.mT, grad_through).baddbmm_(mixed.mT, straight)
    _apply_signs_(grad_units)
    _apply_signs_(grad_out)
    sums, sums_out = torch.empty_like(units), torch.empty_like(units_out)
    for k, weight in enumerate(weights):
        accurate = weight.to(right.dtype)
        write_dot(sums[k], grad_along[k], accurate)
        write_dot(sums_out[k], grad_straight[k], accurate.T)
    of_input = _per_layer(_normalize_backward(units, lengths, sums.add_(grad_units)))
    of_output = _per_layer(_normalize_backward(units_out, lengths_out, sums_out.add_(grad_out)))
    return [a + b for a, b in zip(of_input, of_output, strict=True)]


def _write_units(out: Tensor, sides: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Unit vectors of raw ones (1, d) into `out` (l, m, d); their lengths, as `unit_and_length` has them."""
    raws = [raw for side in sides for raw in side if raw is not None]
    raw = (raws[0] if len(raws) == 1 else torch.cat(raws)).view(out.shape)
    length = raw_lengths(raw)
    write(out, torch.div, raw, length)
    return length


def _apply_signs_(rows: Tensor) -> None:
    """F on rows (l, m, ·), in place. ETHER+'s F is its own inverse."""
    if rows.shape[1] == 1:
        rows.mul_(-2)
    else:
        rows[:, 0].neg_()


def _normalize_backward(signed: Tensor, lengths: Tensor, grads: Tensor) -> Tensor:
    """From rows of F U: the sign of a unit vector is squared, ETHER's factor is not one."""
    return normalize_backward(signed * -0.5 if signed.shape[1] == 1 else signed, lengths, grads)


def _per_layer(raw: Tensor) -> list[tuple[Tensor, ...]]:
    """(l, m, d) as m tensors (1, d) for each layer."""
    return [tuple(each.unsqueeze(0) for each in layer.unbind()) for layer in raw.unbind()]
