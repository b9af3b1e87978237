"""Adapters in main memory, as exact factors of what they change in the weights of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.fit import fit
from ether_diffusion.adapters.schema import AdapterFile
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.errors import EtherFileError
from ether_diffusion.export.changes import orthonormal
from ether_diffusion.serving.base_weights import effective_weight
from ether_diffusion.tuner.transforms import Vectors, low_rank_delta

# Axes: i inputs and o outputs of a layer, k positions of its kernel, r the rank of a change.

Pair = tuple[Tensor, Tensor]
"""ΔWᵀ = A B: A (i·k, r) and B (r, o), at strength 1, on the CPU; float32, or float64 for a float64 layer."""


@dataclass(frozen=True)
class HostAdapter:
    """One adapter of any method in main memory.

    factors: component -> module path -> (A, B).
    vectors: likewise, of an ETHER adapter; it reflects what adapters before it in a row have made of the weight.
    """

    source: str
    factors: Mapping[str, Mapping[str, Pair]]
    vectors: Mapping[str, Mapping[str, Vectors]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pairs = (tensor for layers in self.factors.values() for pair in layers.values() for tensor in pair)
        vectors = (
            each for layers in self.vectors.values() for own in layers.values() for each in own.named().values()
        )
        return sum(tensor.nbytes for tensor in (*pairs, *vectors))


@torch.no_grad()
def from_ether_file(pipe: DiffusionPipeline, file: AdapterFile) -> HostAdapter:
    """An ETHER adapter of a file that fits the pipeline; its factors are those of the weights that are there now.

    Raises:
        EtherFileError: it does not fit, or holds more than vectors.
    """
    if file.weights:
        what = "a control encoder" if CONTROL in file.weights else f"replaced modules of {', '.join(file.weights)}"
        raise EtherFileError(f"{file.source} holds {what}, which no single row of a batch can have: load it alone")
    models, found = models_of(pipe), fit(pipe, file, compare_base=False).layers
    vectors = {component: {path: _vectors(own) for path, own in layers.items()} for component, layers in found.items()}
    factors: dict[str, dict[str, Pair]] = {}
    for component, layers in vectors.items():
        modules, dtype = dict(models[component].named_modules()), models[component].dtype
        for path, own in layers.items():
            try:
                weight = effective_weight(modules[path], dtype)
            except ValueError as error:
                raise EtherFileError(f"{file.source}: {component}.{path}: {error}") from error
            factors.setdefault(component, {})[path] = _pair(weight, own)
    return HostAdapter(file.source, factors, vectors)


def _vectors(own: Mapping[str, Tensor]) -> Vectors:
    """Copies: the file is mapped from the disk, and may be replaced."""
    return Vectors(*(own.get(f"ether_{name}") for name in Vectors._fields)).map(lambda vector: vector.float().clone())


def _pair(weight: Tensor, vectors: Vectors) -> Pair:
    down, up = low_rank_delta(weight, vectors.map(lambda vector: vector.to(weight.device)))
    return _as_pair(down, up, cancels=vectors.v is not None)


def _as_pair(down: Tensor, up: Tensor, *, cancels: bool) -> Pair:
    """Factors (r, i·k) and (o, r) as they are kept."""
    dtype = down.dtype
    if cancels or len(down) > min(down.shape[1], len(up)):
        down, up = orthonormal(down.cpu(), up.cpu())
    return down.T.to("cpu", dtype).contiguous(), up.T.to("cpu", dtype).contiguous()


@torch.no_grad()
def compose(pipe: DiffusionPipeline, adapters: Sequence[tuple[HostAdapter, float]]) -> dict[str, dict[str, Pair]]:
    """The factors of what adapters change together at their strengths, component -> module path -> (A, B).

    As on a pipeline: each ETHER adapter reflects what those before it have made of the weight, LoRAs are added. A
    layer with one adapter alone has that one's factors, B times its strength.
    """
    models = models_of(pipe)
    dtype_of = cache(lambda component: models[component].dtype)  # a model looks for it in all of its layers
    places = {(c, path): None for adapter, _ in adapters for c, layers in adapter.factors.items() for path in layers}
    composed: dict[str, dict[str, Pair]] = {}
    for component, path in places:
        own = [(a, strength) for a, strength in adapters if strength != 0 and path in a.factors.get(component, {})]
        if own:
            composed.setdefault(component, {})[path] = _composed(models[component], dtype_of, component, path, own)
    return composed


def _composed(
    model: nn.Module,
    dtype_of: Callable[[str], torch.dtype],
    component: str,
    path: str,
    own: Sequence[tuple[HostAdapter, float]],
) -> Pair:
    pairs = [(a.factors[component][path][0], strength * a.factors[component][path][1]) for a, strength in own]
    reflecting = [path in adapter.vectors.get(component, {}) for adapter, _ in own]
    if len(pairs) == 1:
        return pairs[0]
    if not any(reflecting[1:]):
        return torch.cat([down for down, _ in pairs], 1), torch.cat([up for _, up in pairs])
    weight = effective_weight(model.get_submodule(path), dtype_of(component))
    weight = weight.to("cpu", pairs[0][0].dtype).clone()
    downs, ups = [], []
    for (down, up), (adapter, strength), reflects in zip(pairs, own, reflecting, strict=True):
        if reflects and downs:
            vectors = adapter.vectors[component][path]
            down, up = (factor.T for factor in low_rank_delta(weight, vectors, strength))
        downs.append(down)
        ups.append(up)
        weight += (down @ up).T.view(weight.shape)
    return _as_pair(torch.cat(downs, 1).T, torch.cat(ups).T, cancels=True)
