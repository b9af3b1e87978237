"""What adapters do, told from their vectors: how far a transform moves, how far it has turned, how two of them clash.

Axes: d the width of one side of a layer, n its blocks, b = d/n; g groups of blocks, m vectors in a group.
All of it is exact and in float64; no d×d matrix is built.

Source of the transforms: ETHER, arXiv:2405.20271.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import Transform


def transform_of(u: Tensor, v: Tensor | None = None) -> Transform:
    """The transform of raw vectors (n, b), in float64: ETHER's, or with `v` ETHER+'s."""
    return Transform.of(u.double(), None if v is None else v.double())


def transform_distance(transform: Transform) -> float:
    """‖T − I‖_F, from T − I = Σ_j f_j blockdiag_k(û_jk û_jkᵀ): the root of Σ_k Σ_jl f_j f_l (û_jk·û_lk)².

    ETHER: always 2√n. ETHER+: √Σ_k(2 − 2(û_k·v̂_k)²), from 0 at the start to √(2n).
    """
    pairs = [(f, a) for f, a in zip(transform.factors, transform.units, strict=True)]
    square = sum(f * g * (a * b).sum(-1).square().sum().item() for f, a in pairs for g, b in pairs)
    return math.sqrt(max(square, 0.0))


def angles_from_start(transform: Transform) -> Tensor | None:
    """How far each block has turned since the start, (n,) in degrees from 0 to 90; None for ETHER.

    ETHER+ starts with û and v̂ on one line (v = −u), so it is the angle between the two lines. ETHER starts at a random
    direction, which its vectors no longer tell.
    """
    if len(transform.units) == 1:
        return None
    u, v = transform.units
    cosine = (u * v).sum(-1, keepdim=True)
    sine = torch.linalg.vector_norm(v - cosine * u, dim=-1)  # arccos alone is blind near 0
    return torch.rad2deg(torch.atan2(sine, cosine.abs().squeeze(-1)))


class Conflict(NamedTuple):
    """How two adapters on one side of a layer get in each other's way."""

    alignment: float
    """max |û_a·û_b| over their vectors that share coordinates: 0 if neither touches what the other does, 1 at most."""
    commutator: float
    """‖T_a T_b − T_b T_a‖_F: 0 if the order in which they are applied makes no difference."""


def conflict(a: Transform, b: Transform) -> Conflict:
    """The conflict between the transforms of two adapters, at strength 1.

    With the vectors as rows A (m_a, d) and B (m_b, d), G = A Bᵀ and K = F_a G F_b, T_a T_b − T_b T_a = X − Xᵀ for
    X = Aᵀ K B, and ‖X − Xᵀ‖² = 2 tr(Kᵀ AAᵀ K BBᵀ) − 2 tr(K Gᵀ K Gᵀ). Different numbers of blocks are compared on the
    finest blocks that both respect.

    Raises:
        ValueError: the transforms are of different widths.
    """
    widths = [transform.units[0].numel() for transform in (a, b)]
    if widths[0] != widths[1]:
        raise ValueError(f"transforms of widths {widths[0]} and {widths[1]} do not act on the same layer")
    groups = math.gcd(len(a.units[0]), len(b.units[0]))
    (rows_a, factors_a), (rows_b, factors_b) = _rows(a, groups), _rows(b, groups)
    gram = rows_a @ rows_b.mT  # (g, m_a, m_b)
    kernel = factors_a[:, None] * gram * factors_b
    size = torch.einsum("gij,gik,gkl,glj->", kernel, rows_a @ rows_a.mT, kernel, rows_b @ rows_b.mT)
    back = torch.einsum("gij,gkj,gkl,gil->", kernel, gram, kernel, gram)
    return Conflict(min(gram.abs().max().item(), 1.0), math.sqrt(max(2 * (size - back).item(), 0.0)))


def _rows(transform: Transform, groups: int) -> tuple[Tensor, Tensor]:
    """Vectors by equal parts of the width, (g, m, d/g) with zeros outside their block, and their factors (m,)."""
    rows, factors = [], []
    for unit, factor in zip(transform.units, transform.factors, strict=True):
        parts = unit.unflatten(0, (groups, -1))  # (g, n/g, b)
        rows.append(torch.diag_embed(parts.mT, dim1=1, dim2=2).flatten(2))
        factors.append(unit.new_full((parts.shape[1],), factor))
    return torch.cat(rows, 1), torch.cat(factors)
