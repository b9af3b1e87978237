"""The maths of ETHER and ETHER+: the only place where a reflection is computed.

Axes: d a dimension that is transformed, n its blocks, b = d/n their width, o and i outputs and inputs of a weight,
k positions of a convolution's kernel. Raw vectors `u`, `v` have shape (n, b) and any length but zero; û = u/|u|.

Source: ETHER, arXiv:2405.20271, sections 3.2 (ETHER), 3.3 (ETHER+) and 3.4 (blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LENGTH = 1e-30
"""A raw vector that is shorter, or denormal, has no direction: its block is left as it is. The gradient grows with
1/|r|, and would overflow below."""


class Vectors(NamedTuple):
    """The raw vectors of one adapter in one layer; None where its method has no such vector.

    u, v: input side, (n, i/n). Without `v` the transform is ETHER's, with it ETHER+'s.
    u_out, v_out: output side, (n, o/n), likewise; without `u_out` outputs are not transformed.
    """

    u: Tensor
    v: Tensor | None = None
    u_out: Tensor | None = None
    v_out: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: vector for name, vector in self._asdict().items() if vector is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Vectors:
        """`change` of every vector that there is."""
        return Vectors(*(None if vector is None else change(vector) for vector in self))

    def sides(self) -> list[tuple[Tensor, Tensor | None]]:
        """(u, v) of the input side, and of the output side where it is transformed."""
        return [(self.u, self.v)] if self.u_out is None else [(self.u, self.v), (self.u_out, self.v_out)]


class Adaptation(NamedTuple):
    """What one adapter does to one weight: the arguments of `adapt_weight` after the weight."""

    vectors: Vectors
    strength: float = 1.0


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reflection is computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(raw: Tensor) -> Tensor:
    """Unit vectors û_k = r_k / |r_k|, one per block.

    raw: (..., n, b) of any floating dtype. Returns (..., n, b) in float32 (float64 for float64). Neither tiny nor huge
    vectors lose their direction; a zero vector (see SMALLEST_LENGTH) gives û = 0 and finite gradients.
    """
    return unit_and_length(raw)[0]


def unit_and_length(raw: Tensor) -> tuple[Tensor, Tensor]:
    """û as `normalize` gives it, and |r|: (..., n, b) and (..., n, 1). Where r has no direction, û = 0 and |r| = ∞."""
    length = raw_lengths(raw)
    return raw.to(length.dtype) / length, length


def raw_lengths(raw: Tensor) -> Tensor:
    """|r|, or ∞ where r has no direction: (..., n, b) to (..., n, 1), in float32 (float64 for float64)."""
    smallest = max(SMALLEST_LENGTH, torch.finfo(raw.dtype).smallest_normal)
    # Squares of float32 neither overflow nor vanish in float64.
    length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float64)
    return torch.nn.functional.threshold(length.to(accurate_dtype(raw.dtype)), smallest, math.inf)


def normalize_backward(unit: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `normalize`, dL/dr = (dL/dû − (û·dL/dû) û) / |r|; 0 where r has no direction.

    unit (..., n, b) and length (..., n, 1) as from `unit_and_length`; grad: (..., n, b).
    """
    along = (unit * grad).sum(dim=-1, keepdim=True)
    return torch.addcmul(grad, along, unit, value=-1).div_(length)


def project(x: Tensor, unit: Tensor) -> Tensor:
    """x·û of every block: x (..., d) and unit (n, d/n) of one dtype to (..., n)."""
    if len(unit) == 1:
        return (x @ unit[0]).unsqueeze(-1)
    return torch.einsum("...nb,nb->...n", x.unflatten(-1, unit.shape), unit)


def add_along(x: Tensor, coefficients: Tensor, unit: Tensor, factor: float) -> Tensor:
    """x + factor · Σ_k c_k û_k: x (..., d), coefficients (..., n), unit (n, d/n), of one dtype."""
    blocks = x.unflatten(-1, unit.shape)
    return torch.addcmul(blocks, coefficients.unsqueeze(-1), unit, value=factor).flatten(-2)


def gather(x: Tensor, coefficients: Tensor, blocks: int) -> Tensor:
    """The transpose of `project`, Σ over rows of c_k x_k: x (N, d) and coefficients (N, n) to (n, d/n)."""
    if blocks == 1:
        return (x.T @ coefficients[:, 0]).unsqueeze(0)
    return torch.einsum("rnb,rn->nb", x.unflatten(-1, (blocks, -1)), coefficients)


class Transform(NamedTuple):
    """One side's matrix T, known by its unit vectors: T = I + Σ_j f_j blockdiag_k(û_jk û_jkᵀ), symmetric.

    ETHER's has one vector with f = −2, ETHER+'s two with f = −1 and 1.
    """

    units: tuple[Tensor, ...]  # (n, d/n) each, float32 or float64
    factors: tuple[float, ...]

    @classmethod
    def of(cls, u: Tensor, v: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Transform:
        """The transform of raw vectors: ETHER's without `v`. Computes in `dtype`, if that is more accurate."""
        raws, factors = ((u,), (-2.0,)) if v is None else ((u, v), (-1.0, 1.0))
        return cls(
            tuple(normalize(raw).to(torch.promote_types(accurate_dtype(raw.dtype), dtype)) for raw in raws), factors
        )

    def displace(self, x: Tensor) -> Tensor:
        """(T − I)x on the last axis of x: (..., d), of the dtype of the units."""
        moved = torch.zeros_like(x)  # Tx − x would lose a small change in the rounding of x
        for unit, factor in zip(self.units, self.factors, strict=True):
            moved = add_along(moved, project(x, unit), unit, factor)
        return moved

    def apply(self, x: Tensor) -> Tensor:
        """Tx on the last axis of x: (..., d), of the dtype of the units."""
        coefficients = [project(x, unit) for unit in self.units]
        for coefficient, unit, factor in zip(coefficients, self.units, self.factors, strict=True):
            x = add_along(x, coefficient, unit, factor)
        return x


def adapt_weight(weight: Tensor, vectors: Vectors, strength: float = 1.0) -> Tensor:
    """The adapted weight W(α) = W + α(H̃ W H − W); the output side's H̃ is the identity where it has no vectors.

    Args:
        weight: (o, i), or (o, i, *kernel): channels are transformed, every kernel position alike.
        vectors: u, v (n, i/n) and u_out, v_out (n, o/n), of any floating dtype.
        strength: α. At 0 the weight itself is returned.

    Returns:
        The weight's shape and dtype, computed in float32 (float64 for float64) and rounded once.
    """
    if strength == 0:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(accurate_dtype(weight.dtype), vectors.u.dtype)
        full = base = weight.to(dtype)
        for (u, v), axis in zip(vectors.sides(), (1, 0), strict=False):
            full = Transform.of(u, v, dtype).apply(full.movedim(axis, -1)).movedim(-1, axis)
        return (full if strength == 1 else base + strength * (full - base)).to(weight.dtype)


def low_rank_delta(weight: Tensor, vectors: Vectors, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Exact factors of the change, W(α) − W = B A, without a decomposition.

    With the block rows U = blockdiag(ûᵀ): one-sided ETHER has A = U, B = −2α W Uᵀ, of rank n. Two-sided ETHER+, with
    D = VᵀV − UᵀU and M = W(I + D), is W D + D̃ M: A stacks U, V, Ũ M, Ṽ M, of rank 4n at most.

    Args:
        weight, vectors, strength: as for `adapt_weight`. A (o, i, *kernel) weight counts as (o, i·k), and its input
            side then has rank n·k.

    Returns:
        A (r, i·k) and B (o, r), in float32 (float64 for float64).
    """
    dtype = accurate_dtype(weight.dtype)
    flat = weight.to(dtype).flatten(1)  # (o, i·k)
    input_side, *output_side = (Transform.of(u, v) for u, v in vectors.sides())
    downs = [_block_rows(unit, dtype) for unit in input_side.units]  # (n, i)
    if weight.ndim > 2:  # every kernel position is transformed alike: U ⊗ I, (n·k, i·k)
        kernel = torch.eye(math.prod(weight.shape[2:]), dtype=dtype, device=weight.device)
        downs = [torch.kron(rows, kernel) for rows in downs]
    ups = [factor * flat @ rows.T for rows, factor in zip(downs, input_side.factors, strict=True)]
    full = flat + torch.cat(ups, 1) @ torch.cat(downs) if output_side else flat
    for side in output_side:
        for unit, factor in zip(side.units, side.factors, strict=True):
            rows = _block_rows(unit, dtype)  # (n, o)
            downs.append(rows @ full)
            ups.append(factor * rows.T)
    return torch.cat(downs), strength * torch.cat(ups, 1)


def _block_rows(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors (n, b) as the rows of a block-diagonal matrix (n, n·b)."""
    return torch.block_diag(*unit.to(dtype))
