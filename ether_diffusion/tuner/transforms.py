"""The maths of ETHER and ETHER+: the only place where a reflection is computed.

Axes: d a dimension that is transformed, n its blocks, b = d/n their width, o and i outputs and inputs of a weight,
k positions of a convolution's kernel. Raw vectors `u`, `v` have shape (n, b) and any length but zero; û = u/|u|.

Source: ETHER, arXiv:2405.20271, sections 3.2 (ETHER), 3.3 (ETHER+) and 3.4 (blocks).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LENGTH = 1e-30
"""A raw vector that is shorter, or denormal, has no direction: its block is left as it is. The gradient grows with
1/|r|, and would overflow below."""


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
    smallest = max(SMALLEST_LENGTH, torch.finfo(raw.dtype).smallest_normal)
    raw = raw.to(accurate_dtype(raw.dtype))
    # Squares of float32 neither overflow nor vanish in float64.
    length = torch.linalg.vector_norm(raw, dim=-1, keepdim=True, dtype=torch.float64).to(raw.dtype)
    length = torch.nn.functional.threshold(length, smallest, math.inf)
    return raw / length, length


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
        moved = torch.zeros_like(x)
        for unit, factor in zip(self.units, self.factors, strict=True):
            moved = add_along(moved, project(x, unit), unit, factor)
        return moved

    def apply(self, x: Tensor) -> Tensor:
        """Tx on the last axis of x: (..., d), of the dtype of the units."""
        coefficients = [project(x, unit) for unit in self.units]
        for coefficient, unit, factor in zip(coefficients, self.units, self.factors, strict=True):
            x = add_along(x, coefficient, unit, factor)
        return x


def displacement(x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """(T − I)x on the last axis, T the ETHER transform of `u`, or the ETHER+ transform of `u` and `v`.

    ETHER: −2(x·û)û per block. ETHER+: (x·v̂)v̂ − (x·û)û per block.
    x: (..., d); u, v: (n, d/n). Returns (..., d) in float32 (float64 where x or u is), also under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        transform = Transform.of(u, v, accurate_dtype(x.dtype))
        return transform.displace(x.to(transform.units[0].dtype))


def reflect(x: Tensor, u: Tensor, strength: float = 1.0) -> Tensor:
    """ETHER on the last axis of x: x + α(Hx − x), with H = blockdiag_k(I − 2 û_k û_kᵀ).

    x: (..., d); u: (n, d/n), any length but zero; returns x's shape and dtype. Sums in float32.
    α = 1 reflects; α = 0 returns x itself; at α = 0.5 the direction û is erased. Source: arXiv:2405.20271, eq. 1.
    """
    return _moved(x, displacement(x, u), strength) if strength != 0 else x


def relax(x: Tensor, u: Tensor, v: Tensor, strength: float = 1.0) -> Tensor:
    """ETHER+ on the last axis of x: x + α(H⁺x − x), with H⁺ = blockdiag_k(I − û_k û_kᵀ + v̂_k v̂_kᵀ).

    x: (..., d); u, v: (n, d/n), any length but zero; returns x's shape and dtype. Sums in float32.
    Source: arXiv:2405.20271, section 3.3.
    """
    return _moved(x, displacement(x, u, v), strength) if strength != 0 else x


def _moved(x: Tensor, moved: Tensor, strength: float) -> Tensor:
    return (x.to(moved.dtype) + strength * moved).to(x.dtype)


def adapt_weight(
    weight: Tensor,
    u: Tensor,
    v: Tensor | None = None,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """The adapted weight W(α) = W + α(H̃ W H − W); without `u_out` the output side H̃ is the identity.

    Args:
        weight: (o, i), or (o, i, *kernel): channels are transformed, every kernel position alike.
        u, v: input side, (n, i/n). Without `v` the transform is ETHER, with it ETHER+.
        u_out, v_out: output side, (n, o/n), likewise.
        strength: α. At 0 the weight itself is returned.

    Returns:
        The weight's shape and dtype, computed in float32 (float64 for float64) and rounded once.
    """
    if strength == 0:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        side = Transform.of(u, v, accurate_dtype(weight.dtype))
        base = weight.to(side.units[0].dtype)
        full = side.apply(base.movedim(1, -1)).movedim(-1, 1)
        if u_out is not None:
            side = Transform.of(u_out, v_out, base.dtype)
            full = side.apply(full.movedim(0, -1)).movedim(-1, 0)
        return (full if strength == 1 else base + strength * (full - base)).to(weight.dtype)


def _block_rows(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors (n, b) as the rows of a block-diagonal matrix (n, n·b)."""
    return torch.block_diag(*unit.to(dtype))


def low_rank_delta(
    weight: Tensor,
    u: Tensor,
    v: Tensor | None = None,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Exact factors of the change, W(α) − W = B A, without a decomposition.

    With the block rows U = blockdiag(ûᵀ): one-sided ETHER has A = U, B = −2α W Uᵀ, of rank n. Two-sided ETHER+, with
    D = VᵀV − UᵀU and M = W(I + D), is W D + D̃ M: A stacks U, V, Ũ M, Ṽ M, of rank 4n at most.

    Args:
        weight, u, v, u_out, v_out, strength: as for `adapt_weight`. A (o, i, *kernel) weight counts as (o, i·k), and
            its input side then has rank n·k.

    Returns:
        A (r, i·k) and B (o, r), in float32 (float64 for float64).
    """
    dtype = accurate_dtype(weight.dtype)
    base = weight.to(dtype).flatten(2) if weight.ndim > 2 else weight.to(dtype).unsqueeze(-1)  # (o, i, k)
    kernel = torch.eye(base.shape[2], dtype=dtype, device=weight.device)
    flat = base.flatten(1)  # (o, i·k)

    def input_rows(raw: Tensor) -> Tensor:
        return torch.kron(_block_rows(normalize(raw), dtype), kernel)  # (n·k, i·k)

    def output_columns(raw: Tensor) -> Tensor:
        return _block_rows(normalize(raw), dtype).T  # (o, n)

    rows = input_rows(u)
    downs, ups = [rows], [(-2 if v is None else -1) * flat @ rows.T]
    if v is not None:
        rows = input_rows(v)
        downs.append(rows)
        ups.append(flat @ rows.T)
    if u_out is not None:
        full = flat + torch.cat(ups, 1) @ torch.cat(downs, 0)
        columns = output_columns(u_out)
        downs.append(columns.T @ full)
        ups.append((-2 if v_out is None else -1) * columns)
        if v_out is not None:
            columns = output_columns(v_out)
            downs.append(columns.T @ full)
            ups.append(columns)
    return torch.cat(downs, 0), strength * torch.cat(ups, 1)
