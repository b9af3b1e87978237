"""What adapters do: how far transforms and weights move, how far vectors turn, how two adapters clash, and energy.

Axes: d the width of one side of a layer, n its blocks, b = d/n; g groups of blocks, m vectors in a group; o neurons
(rows) of a weight, i their width.
All of it is exact and in float64; no d×d matrix is built.

Source of the transforms: ETHER, arXiv:2405.20271.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.tuner.transforms import Transform, Vectors, low_rank_delta, normalize

CLOSEST = 1e-6
"""Neurons that are nearer than this on the sphere count as this far apart: the energy of equal ones is infinite."""
ROWS_AT_ONCE = 256


def transform_of(u: Tensor, v: Tensor | None = None) -> Transform:
    """The transform of raw vectors (n, b), in float64: ETHER's, or with `v` ETHER+'s."""
    return Transform.of(u.double(), None if v is None else v.double())


def transform_distance(transform: Transform) -> float:
    """‖T − I‖_F, from T − I = Σ_j f_j blockdiag_k(û_jk û_jkᵀ): the root of Σ_k Σ_jl f_j f_l (û_jk·û_lk)².

    ETHER: always 2√n. ETHER+: √Σ_k(2 − 2(û_k·v̂_k)²), from 0 at the start to √(2n).
    """
    terms = list(zip(transform.factors, transform.units, strict=True))
    square = sum(f * g * (a * b).sum(-1).square().sum().item() for f, a in terms for g, b in terms)
    return math.sqrt(max(square, 0.0))


def angles_from_start(transform: Transform) -> Tensor | None:
    """How far each block has turned since the start, (n,) in degrees from 0 to 90; None for ETHER.

    ETHER+ starts with û and v̂ on one line (v = −u), so it is the angle between the two lines. ETHER starts at a random
    direction, which its vectors no longer tell.
    """
    return None if len(transform.units) == 1 else angle_between(*transform.units)


def angle_between(before: Tensor, after: Tensor) -> Tensor:
    """How far each block's vector has turned, as a line: arccos |r̂·r̂'|, (n,) in degrees from 0 to 90.

    û and −û are one reflection, so a vector that was turned about has travelled by nothing.

    before, after: raw vectors (n, b) of any length, such as one of two checkpoints of a training.

    Raises:
        ValueError: other shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"angle_between: vectors of shapes {tuple(before.shape)} and {tuple(after.shape)}; need one")
    before, after = normalize(before.double()), normalize(after.double())
    cosine = (before * after).sum(-1, keepdim=True)
    sine = torch.linalg.vector_norm(after - cosine * before, dim=-1)  # arccos alone is blind near 0
    return torch.rad2deg(torch.atan2(sine, cosine.abs().squeeze(-1)))


def weight_distance(weight: Tensor, vectors: Vectors, strength: float = 1.0) -> float:
    """‖W(α) − W‖_F, from the factors W(α) − W = B A: with Aᵀ = Q R it is ‖B Rᵀ‖_F.

    One-sided ETHER with one block: 2|α| ‖Wû‖. The root of tr(BᵀB AAᵀ) would be the same, and blind near the start of
    ETHER+, where v̂ = −û and the terms cancel.

    weight, vectors, strength: as for `transforms.adapt_weight`; convolutions too.
    """
    exact = vectors.map(lambda vector: vector.detach().double())
    down, up = low_rank_delta(weight.detach().double(), exact, strength)
    triangle = torch.linalg.qr(down.T, mode="r").R
    return torch.linalg.matrix_norm(up @ triangle.T).item()


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


def hyperspherical_energy(weight: Tensor, *, half_space: bool = False) -> float:
    """How unevenly the neurons of a weight lie on the sphere: Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹ over its rows, ŵ = w/|w|.

    Small where they are spread out. With `half_space` a neuron and its antipode are one direction:
    Σ_{i≠j} (‖ŵ_i − ŵ_j‖⁻¹ + ‖ŵ_i + ŵ_j‖⁻¹). Orthonormal neurons have o(o − 1)/√2 and twice that.
    Source: Liu et al., Learning towards Minimum Hyperspherical Energy, arXiv:1805.09298, with s = 1.

    weight: (o, i) of a linear layer, or (o, i, …) of a convolution, whose kernels are flattened. Rows of zeros have no
    direction and are left out.
    """
    rows = weight.detach().flatten(1).to(torch.float64, copy=True)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    directed = lengths.squeeze(1) != 0
    if not directed.all():  # a copy of all rows only where it is needed
        rows, lengths = rows[directed], lengths[directed]
    rows.div_(lengths)
    energy = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        cosines = rows[start : start + ROWS_AT_ONCE] @ rows[start:].T
        for sign in (1, -1) if half_space else (1,):
            distances = (2 - 2 * sign * cosines).clamp_(min=CLOSEST**2).sqrt_()
            energy += 2 * distances.reciprocal_().triu_(1).sum().item()  # each pair counts from both its ends
    return energy


def energy_change(before: Tensor, after: Tensor, *, half_space: bool = False) -> float:
    """The relative change (E' − E)/E of the hyperspherical energy from a weight to another; 0 where E is 0.

    An orthogonal matrix on the input side turns all neurons of a layer alike, at each position of a kernel, and leaves
    their distances: one-sided ETHER at strength 1 changes nothing, nor do, on a linear layer, HRA, and OFT with an
    exact Cayley transform. The series that PEFT's OFT takes in its place is orthogonal near the identity alone. ETHER+
    changes the energy: H⁺ is not orthogonal, and an output side mixes neurons.

    before, after: W and W', as for `hyperspherical_energy`.
    """
    energy = hyperspherical_energy(before, half_space=half_space)
    return (hyperspherical_energy(after, half_space=half_space) - energy) / energy if energy else 0.0


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The weight of each adapted layer as it was and as its active adapters make it, for any method of PEFT.

    Yields:
        The layer's path in the model, W and W', each in the shape and dtype of the layer's weight. The layer is as
        it was, bit for bit, when the next one is asked for.

    Raises:
        ValueError: no layer carries an adapter, or one is merged.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    layers = [(name, layer) for name, layer in layers if hasattr(layer.get_base_layer(), "weight")]
    if not layers:
        raise ValueError("adapted_weights: no layer of the model carries an adapter")
    if merged := next((name for name, layer in layers if layer.merged), None):
        raise ValueError(f"adapted_weights: {merged} is merged; call unmerge_adapter() first")
    for name, layer in layers:
        base = layer.get_base_layer()
        # All parameters, since some methods merge into a bias.
        held = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
        layer.merge()
        try:
            after = base.weight.detach().clone()
        finally:
            layer.unmerge()
            for key, parameter in base.named_parameters():
                parameter.data.copy_(held[key])  # PEFT's own methods subtract, and round
        yield name, held["weight"], after
