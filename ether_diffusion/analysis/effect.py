"""What an adapter does to the weights of a base model, layer by layer: an adapter of ours, or a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, canonical_path
from ether_diffusion.analysis.report import ADAPTER, Side, check_fit, compare, measure, open_base, transforms_of
from ether_diffusion.analysis.weights import adapted_weights, energy_change, hyperspherical_energy, weight_distance
from ether_diffusion.base_models import MINIATURE, base_path, miniature_name, open_pipeline
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import Transform

CONFLICT = ("alignment", "commutator")
Version = tuple[str | None, str | None]
"""Variant and revision of a base."""


def analyze(
    file: str | Path,
    *,
    base: str | Path = MINIATURE,
    variant: str | None = None,
    revision: str | None = None,
    against: str | Path | None = None,
    strength: float = 1.0,
) -> dict[str, Any]:
    """Measure what an adapter changes in every layer of a base, as values of JSON.

    Args:
        file: an adapter, as `describe` takes it, or a local LoRA of diffusers.
        base: a pipeline, as a folder, an id on the Hub, or the name of a miniature.
        variant, revision: of the base, as `from_pretrained` takes them.
        against: a second adapter of ETHER, to look for conflicts with.
        strength: of the adapter, which the distances and energies of weights depend on.

    Raises:
        ValueError: an adapter that cannot be read, holds no adapted layer, or does not fit the base.
        OSError: nothing there, or the Hub cannot be reached.
    """
    lora, version = _lora_file(Path(file)), (variant, revision)
    if lora is None:
        pipe, source, transforms, conflicts, verdict = _with_ether(base_path(base), version, file, against)
    elif against is not None:
        raise InputError(f"--against: compares adapters of ETHER, but {file} is a LoRA")
    else:
        pipe, source = _with_lora(base_path(base), version, lora), str(lora)
        transforms, conflicts, verdict = {}, {}, None
    pipe.set_adapters([ADAPTER], [strength])
    layers = []
    for component, model in models_of(pipe).items():
        for path, before, after in adapted_weights(model) if _is_adapted(model) else ():
            name = canonical_path(component, path)
            sides = {
                side[2]: measure(transform) | conflicts.get(side, dict.fromkeys(CONFLICT))
                for side, transform in transforms.items()
                if side[:2] == (component, name)
            }
            figures = _describe_weights(model.get_submodule(path), before, after)
            layers.append({"component": component, "path": name, "sides": sides, **figures})
    return {
        "file": source,
        "base": f"the {shipped}" if (shipped := miniature_name(base)) else str(base),
        "fit": verdict,
        "strength": strength,
        "against": None if against is None else str(against),
        "layers": layers,
    }


def _with_ether(
    base: str, version: Version, file: str | Path, against: str | Path | None
) -> tuple[DiffusionPipeline, str, dict[Side, Transform], dict[Side, dict[str, float]], str | None]:
    """The base with the adapter on it, the file, its transforms, its conflicts with the other, and the verdict."""
    adapter = find_adapter_file(file)
    other = None if against is None else find_adapter_file(against)  # both before the base, which takes longer
    if not adapter.tensors:
        raise InputError(f"{adapter.source}: holds no vectors of ETHER, needs an adapter that has some")
    pipe = open_base(base, adapter, *version)
    adapter, other, fit = check_fit(pipe, adapter, other)
    if fit["error"]:
        raise EtherFileError(fit["error"])
    rows = [] if other is None else compare(adapter, other)["conflicts"]
    if other is not None and not rows:
        raise InputError(f"--against: {against} adapts no layer that {file} does; there is nothing to compare")
    conflicts = {(row["component"], row["path"], row["side"]): {name: row[name] for name in CONFLICT} for row in rows}
    return pipe, adapter.source, transforms_of(adapter), conflicts, fit["verdict"]


def _lora_file(path: Path) -> Path | None:
    """The file, if what is there is a LoRA for diffusers' pipelines."""
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        path = path / LORA_WEIGHT_NAME_SAFE
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            return path if any("lora" in key for key in file.keys()) else None
    except SafetensorError:
        return None  # `find_adapter_file` says what is wrong with it


def _with_lora(base: str, version: Version, file: Path) -> DiffusionPipeline:
    variant, revision = version
    pipe = open_pipeline(base, variant=variant, revision=revision)
    try:
        pipe.load_lora_weights(file, adapter_name=ADAPTER)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{file}: is no LoRA for {base}: {str(error).splitlines()[0]}") from error
    if not any(map(_is_adapted, models_of(pipe).values())):
        raise InputError(f"{file}: no layer of {base} has the name of one in this LoRA")
    return pipe


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def _describe_weights(layer: nn.Module, before: Tensor, after: Tensor) -> dict[str, float]:
    if isinstance(layer, EtherLayer):  # exact, where the difference of two weights is rounded
        distance = weight_distance(before, layer.vectors(ADAPTER), layer.scaling[ADAPTER])
    else:
        distance = torch.linalg.vector_norm(after.double() - before.double()).item()
    return {
        "weight_distance": distance,
        "relative_distance": distance / torch.linalg.vector_norm(before.double()).item(),
        "energy": hyperspherical_energy(before),
        "energy_change": energy_change(before, after),
        "half_space_energy_change": energy_change(before, after, half_space=True),
    }
