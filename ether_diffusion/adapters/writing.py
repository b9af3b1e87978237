"""Collect an adapter from a pipeline and write it to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch import Tensor

from ether_diffusion.adapters.components import (
    AdapterRecord,
    ether_layers,
    models_of,
    names_of,
    records_of,
    replaceable_parameters,
)
from ether_diffusion.adapters.encoder_entry import about_encoder
from ether_diffusion.adapters.fingerprint import base_model_name, fingerprint
from ether_diffusion.adapters.reading import interpret
from ether_diffusion.adapters.schema import (
    FORMAT_VERSION,
    AdapterFile,
    ModuleWeights,
    canonical_path,
    config_fields,
    digest,
)
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.files import replace_file
from ether_diffusion.tuner.config import EtherConfig

LIBRARIES = ("ether-diffusion", "diffusers", "peft", "torch", "transformers")
"""Those whose versions a file records."""


def collect(
    pipe: DiffusionPipeline, adapter_name: str, replaced_modules: Mapping[str, Sequence[str]] | None = None
) -> AdapterFile:
    """Copies of the named adapter's vectors, its modules as they are, and what identifies its base model.

    Args:
        replaced_modules: modules that were trained in place and belong to it, as component -> module paths.

    Raises:
        ValueError: a component or module that is not there, or cannot be held in a file.
    """
    record = records_of(pipe).get(adapter_name) or AdapterRecord(adapter_name)
    configs: dict[str | None, EtherConfig] = {}
    tensors: dict[str | None, dict[str, Tensor]] = {}
    fingerprints: dict[str, dict[str, str]] = {}
    for component, first in names_of(pipe).items():  # a model under two names is written under both
        if first not in record.configs:
            continue
        layers = {
            canonical_path(component, path): layer
            for path, layer in ether_layers(models_of(pipe)[first])
            if adapter_name in layer.ether_u
        }
        configs[component] = record.configs[first]
        tensors[component] = {
            f"{path}.ether_{name}": vector.detach().clone()
            for path, layer in layers.items()
            for name, vector in layer.vectors(adapter_name).named().items()
        }
        fingerprints[component] = fingerprint({path: layer.unmerged_weight() for path, layer in layers.items()})
    base = {"base_model": base_model_name(pipe), "base_fingerprint": fingerprints}
    weights = _weights_of(pipe, record, replaced_modules or {})
    return AdapterFile(configs, tensors, {**record.metadata, **base}, weights=weights)


def _weights_of(
    pipe: DiffusionPipeline, record: AdapterRecord, more: Mapping[str, Sequence[str]]
) -> dict[str, ModuleWeights]:
    """What an adapter holds besides vectors: its control encoder, and modules of components."""
    weights, models, names = {}, models_of(pipe), names_of(pipe)
    if record.control is not None:
        encoder = record.control.encoder
        weights[CONTROL] = ModuleWeights(
            about_encoder(encoder), {name: p.detach() for name, p in encoder.named_parameters()}
        )
    chosen = {component: set(replaced.modules) for component, replaced in record.replaced.items()}
    for component, paths in more.items():
        component = names.get(component, component)
        if component not in models or isinstance(paths, str) or not paths:
            raise ValueError(
                f"replaced_modules: {component}: {paths!r}: a list of module paths of one of {', '.join(models)} fits"
            )
        chosen[component] = chosen.get(component, set()) | set(paths)
    for component, paths in sorted(chosen.items()):
        found = replaceable_parameters(f"replaced_modules: {component}", models[component], sorted(paths))
        for name in (name for name, first in names.items() if first == component):
            tensors = {key: p.detach() if name == component else p.detach().clone() for key, p in found.items()}
            weights[name] = ModuleWeights({"modules": sorted(paths)}, tensors)
    return weights


def write_adapter_file(path: Path, adapter: AdapterFile) -> None:
    """Write an adapter, complete or not at all: the file appears under its name when all of it is on the disk.

    Whatever happens before (a full disk, a kill, a power cut), a file of that name stays as it was. What could not be
    read again is not written.

    Raises:
        ValueError: a config with `bias` or `modules_to_save`, a vector or weight that is broken, or nothing to write.
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = {
        f"{component}.{key}": tensor.detach().cpu().contiguous()
        for part in (adapter.tensors, {name: weights.tensors for name, weights in adapter.weights.items()})
        for component, own in part.items()
        for key, tensor in own.items()
    }
    if not tensors:
        raise ValueError("there is no ETHER adapter to save")
    document = {
        **{name: value for name, value in adapter.metadata.items() if name != "weights"},
        "format_version": FORMAT_VERSION if adapter.weights else 1,
        "configs": {component: config_fields(str(component), config) for component, config in adapter.configs.items()},
        "versions": {name: version(name) for name in LIBRARIES},
    }
    if adapter.weights:
        document["weights"] = {component: weights.about for component, weights in adapter.weights.items()}
    text = json.dumps(document, sort_keys=True)
    interpret(f"{path} was not saved", tensors, text)  # with every check of reading
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(tensors, {"format": "pt", "ether": text, "sha256": digest(tensors, text)}))
