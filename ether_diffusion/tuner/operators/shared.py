"""Factors of many layers of one shape, made together and read by each of them on its own.

Axes: l layers, r rows of the factors, d inputs or outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.operators.factors import Factors, make_factors, raw_gradients
from ether_diffusion.tuner.operators.products import reads_half
from ether_diffusion.tuner.operators.single_block import Halves, LayerFactors, without_autocast
from ether_diffusion.tuner.transforms import Vectors


class FactorGroup:
    """The factors of layers of one shape, dtype, device and method, each with a single block.

    Differentiable once, though in several backward passes: a checkpointed part of a model may have one of its own.
    """

    def __init__(self, weights: Sequence[Tensor], vectors: Sequence[Vectors]):
        self.weights = list(weights)
        self._halves: dict[torch.dtype, Halves] = {}
        raws = [raw for each in vectors for raw in each.named().values()]
        with without_autocast(weights[0].device.type):
            made = _Make.apply(self, list(vectors), *raws)
        count = len(self.weights)
        self.layers = [
            SharedFactors(self, k, made[k], made[count + k], weight, each, _versions(weight, each))
            for k, (weight, each) in enumerate(zip(weights, vectors, strict=True))
        ]

    def halves(self, layer: int, dtype: torch.dtype) -> Halves:
        """The rounded factors of a layer; those of all layers are made when the first one asks."""
        if dtype not in self._halves:
            with torch.no_grad():
                split = self.weights[0].dtype == dtype  # else the weight's update is summed and cast in any case
                self._halves[dtype] = _split(self.made, dtype) if split else _rounded(self.made, dtype)
        right, left = self._halves[dtype]
        return Halves(right[layer], left[layer])


class SharedFactors(NamedTuple):
    """The factors of one layer in a group, and the tensors that they were made of."""

    group: FactorGroup
    index: int
    right: Tensor  # (r, i)
    left: Tensor  # (r, o)
    weight: Tensor
    vectors: Vectors
    versions: tuple[int, ...]  # how often PyTorch had seen each tensor change

    def fit(self, weight: Tensor, vectors: Vectors) -> bool:
        """Whether they are those of this weight and these vectors still: the same tensors, and unchanged."""
        same = weight is self.weight and all(a is b for a, b in zip(vectors, self.vectors, strict=True))
        return same and self.versions == _versions(weight, vectors)

    def read(self, x: Tensor) -> LayerFactors:
        """The factors as the layer reads them for an input."""
        halves = self.group.halves(self.index, x.dtype) if reads_half(x, self.right.dtype) else None
        return LayerFactors(self.right, self.left, halves)


def _versions(weight: Tensor, vectors: Vectors) -> tuple[int, ...]:
    tensors = (weight, *vectors)
    return tuple(each._version for each in tensors if each is not None and not each.is_inference())


def _rounded(made: Factors, dtype: torch.dtype) -> Halves:
    return Halves(made.right.to(dtype), made.left.to(dtype))


def _split(made: Factors, dtype: torch.dtype) -> Halves:
    """Rounded parts and rests: (l, 3 r, d)."""
    right, left = _rounded(made, dtype)
    rest_right, rest_left = ((a - b).to(dtype) for a, b in zip(made[:2], (right, left), strict=True))
    return Halves(torch.cat((right, rest_right, right), 1), torch.cat((left, left, rest_left), 1))


class _Make(torch.autograd.Function):
    """(group, vectors of each layer, all raw vectors flat) -> right of each layer, then left of each."""

    @staticmethod
    def forward(ctx, group: FactorGroup, vectors: list[Vectors], *raws: Tensor) -> tuple[Tensor, ...]:
        group.made = make_factors(group.weights, vectors)
        # Not by `save_for_backward`, which a first backward pass would free.
        ctx.weights, ctx.made = group.weights, group.made
        ctx.set_materialize_grads(False)
        return (*group.made.right.unbind(), *group.made.left.unbind())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, made = len(ctx.weights), ctx.made
        of_layer = len(ctx.needs_input_grad[2:]) // count
        found = [each is not None for each in grads[:count]]
        if not any(found):
            return (None,) * len(ctx.needs_input_grad)
        right, left = _stacked(grads[:count], made.right), _stacked(grads[count:], made.left)
        with without_autocast(right.device.type):
            raws = raw_gradients(ctx.weights, made, right, left)
        of_layers = [raw if called else (None,) * of_layer for raw, called in zip(raws, found, strict=True)]
        return None, None, *itertools.chain(*of_layers)


def _stacked(grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """(l, r, d), with 0 for layers that were not called."""
    if any(each is None for each in grads):
        zero = torch.zeros_like(like[0])
        grads = [zero if each is None else each for each in grads]
    return torch.stack(grads)
