"""Which base weights an adapter was made on, as far as can be told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ether_diffusion.adapters.schema import bytes_of
from ether_diffusion.base_models import miniature_name, public_name
from ether_diffusion.tuner.base_layer import is_plain

FINGERPRINT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fingerprint(weights: Mapping[str, Tensor], dtypes: Iterable[str] = tuple(FINGERPRINT_DTYPES)) -> dict[str, str]:
    """SHA-256 over base weights (path, shape, values), by the dtype that they are rounded to.

    A float32 model has one for each half precision, so that its own half-precision copies are recognised; a model in
    half precision has its own alone, a quantised or offloaded one none.

    Args:
        weights: module path in its canonical form -> weight.
        dtypes: names of those to compute.
    """
    if not all(map(is_plain, weights.values())):
        return {}
    prints = {}
    for name in dtypes:
        dtype = FINGERPRINT_DTYPES[name]
        if all(weight.dtype in (dtype, torch.float32, torch.float64) for weight in weights.values()):
            total = hashlib.sha256()
            for path, weight in sorted(weights.items()):
                total.update(f"\0{path}\0{tuple(weight.shape)}\0".encode())
                total.update(bytes_of(weight.to(dtype)))
            prints[name] = total.hexdigest()
    return prints


def differing_components(weights: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> list[str]:
    """Components whose base weights are not those that the adapter was made on, as far as can be told.

    Args:
        weights: component -> module path in its canonical form -> weight, of the layers that the adapter adapts.
        metadata: of its file.
    """
    recorded = metadata.get("base_fingerprint") or {}
    differing = []
    for component, own in weights.items():
        then = recorded.get(component, {})
        # One that agrees is enough, and each costs a pass over the weights.
        now = {name: found[name] for name in FINGERPRINT_DTYPES if name in then if (found := fingerprint(own, [name]))}
        if now and not any(then[name] == now[name] for name in now):
            differing.append(component)
    return differing


def base_model_name(pipe: DiffusionPipeline) -> str | None:
    """Hub id of the base model, or the name of its folder: a path says nothing on another machine."""
    name = getattr(pipe.config, "_name_or_path", None)
    if not name:
        return None
    if shipped := miniature_name(name):
        return public_name(shipped)
    return Path(name).name if Path(name).is_dir() else str(name)
