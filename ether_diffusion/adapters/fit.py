"""Check an adapter file against a pipeline, without changing it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.components import (
    as_names,
    base_of,
    base_weights,
    models_of,
    names_of,
    replaceable_parameters,
)
from ether_diffusion.adapters.encoder_entry import empty_encoder
from ether_diffusion.adapters.fingerprint import differing_components
from ether_diffusion.adapters.schema import AdapterFile, ModuleWeights
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.control.encoder import CONTROL, AnyEncoder
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.guards import projects_at_once


@dataclass
class Fitted:
    """An adapter file that fits a pipeline, and where each part of it belongs.

    file: it names its components now.
    layers: component -> module path in the model -> vector by name.
    parameters: component -> the parameters that its modules' weights are written over.
    encoder: its control encoder.
    other_base: components whose base weights are not those that it was made on, as far as can be told.
    """

    file: AdapterFile
    layers: dict[str, dict[str, dict[str, Tensor]]]
    parameters: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    encoder: AnyEncoder | None = None
    other_base: list[str] = field(default_factory=list)


def restrict(pipe: DiffusionPipeline, file: AdapterFile, components: Sequence[str] | str) -> AdapterFile:
    """The part of an adapter file that is for the named components of a pipeline.

    Raises:
        ValueError: no name or list of names.
        EtherFileError: an empty list, or one of which the file holds nothing; a file without names fits none of them.
    """
    wanted = as_names("components", components)
    if None in file.configs:
        models = models_of(pipe)
        held = list(models)
        if not set(wanted) - set(held) and wanted:
            file = _name_component(file, {name: models[name] for name in wanted})
    else:
        held = list(dict.fromkeys([*file.configs, *file.weights]))
    if (unknown := [name for name in wanted if name not in held]) or not wanted:
        raise EtherFileError(
            f"components: {', '.join(map(str, unknown)) or 'no name'}: {file.source} can be loaded onto "
            f"{', '.join(held)}"
        )
    return replace(
        file,
        configs={name: config for name, config in file.configs.items() if name in wanted},
        tensors={name: tensors for name, tensors in file.tensors.items() if name in wanted},
        weights={name: weights for name, weights in file.weights.items() if name in wanted},
    )


def fit(pipe: DiffusionPipeline, file: AdapterFile, *, compare_base: bool = True) -> Fitted:
    """Find the place of every part of an adapter file.

    compare_base: tell `other_base`, which takes a pass over all weights that are adapted.

    Raises:
        EtherFileError: the first part that does not fit: what the file has and what the pipeline needs.
    """
    models = models_of(pipe)
    if None in file.configs:
        file = _name_component(file, models)
    file = _under_first_names(file, names_of(pipe))
    held = set(file.tensors) | set(file.weights)
    if unknown := sorted(held - set(models) - {CONTROL}):
        shared = sorted(held & set(models))
        raise EtherFileError(
            f"{file.source} adapts {', '.join(unknown)}, which this {type(pipe).__name__} does not have; it has "
            + ", ".join(models)
            + (f"; components={shared} loads what is for these alone" if shared else "")
        )
    layers = {
        component: _layers_for(f"{file.source}: {component}", models[component], file.configs[component], tensors)
        for component, tensors in file.tensors.items()
    }
    fitted = Fitted(file, layers)
    for component, weights in file.weights.items():
        where = f"{file.source}: {component}"
        if component == CONTROL:
            fitted.encoder = _encoder_for(pipe, where, weights)
        else:
            fitted.parameters[component] = _parameters_for(where, models[component], weights)
    if compare_base:
        own = {component: base_weights(models[component], component, paths) for component, paths in layers.items()}
        fitted.other_base = differing_components(own, file.metadata)
    return fitted


def _under_first_names(file: AdapterFile, names: Mapping[str, str]) -> AdapterFile:
    """The file with each model's parts once, under the first of the names that the model has in the pipeline.

    Raises:
        EtherFileError: the file holds something else for another name of the same model.
    """
    for name, first in names.items():
        if name != first:
            for held in (file.tensors, {each: weights.tensors for each, weights in file.weights.items()}):
                if {name, first} <= set(held) and not _are_equal(held[name], held[first]):
                    raise EtherFileError(
                        f"{file.source}: {first} and {name} are one model here, but the file holds different vectors "
                        "or weights for them"
                    )
            renamed = {
                part: {first if each == name else each: value for each, value in getattr(file, part).items()}
                for part in ("configs", "tensors", "weights")
            }
            file = replace(file, **renamed)
    return file


def _are_equal(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return first.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def _name_component(file: AdapterFile, models: Mapping[str, nn.Module]) -> AdapterFile:
    """Find the component of a file that does not name it, as the only one that it fits.

    Raises:
        EtherFileError: it fits none (says why of each), or several.
    """
    config, tensors = file.configs[None], file.tensors[None]
    fitting, reasons = [], []
    for component, model in models.items():
        try:
            _layers_for(component, model, config, tensors)
            fitting.append(component)
        except EtherFileError as error:
            reasons.append(str(error))
    if len(fitting) != 1:
        what = f"fits several components ({', '.join(fitting)})" if fitting else "fits no component of this pipeline"
        raise EtherFileError("; ".join([f"{file.source} {what}", *([] if fitting else reasons)]))
    return AdapterFile({fitting[0]: config}, {fitting[0]: tensors}, file.metadata, file.source)


def _layers_for(where: str, model: nn.Module, config: EtherConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Check one component's vectors, sound in themselves, against a model: module path in it -> vectors by name.

    Raises:
        EtherFileError: names the first module that does not fit, what the file has for it and what it would need.
    """
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, vector = key.rpartition(".")
        name = find_module(modules, path)
        if name is None or "base_layer" in path.split("."):
            raise EtherFileError(
                f"{where}: {path} does not exist in this {type(model).__name__}; the adapter was made for another "
                "architecture"
            )
        if obstacle := _obstacle(modules, name):
            raise EtherFileError(f"{where}: {path} {obstacle}")
        width, n = _width(base_of(modules[name]), vector), config.num_blocks
        if width % n or tuple(tensor.shape) != (n, width // n):
            side = "outputs" if vector.endswith("_out") else "inputs"
            fits = f"({n}, {width // n})" if width % n == 0 else f"num_blocks that divide {width}"
            raise EtherFileError(
                f"{where}: {key} has shape {tuple(tensor.shape)}, but the layer here has {width} {side} and needs "
                f"{fits}; the adapter was made for another architecture"
            )
        if vector in found.setdefault(name, {}):
            raise EtherFileError(f"{where}: {key} is there twice, under two names of the same layer")
        found[name][vector] = tensor
    return found


def find_module(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The name in this model of the module at a canonical path, in whichever release's naming the model has."""
    candidates = (path, path.removeprefix("text_model."), f"text_model.{path}")
    return next((name for name in candidates if name in modules), None)


def _obstacle(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Why the module of this name cannot carry ETHER, in words, or None where it can."""
    base, steps = base_of(modules[name]), name.split(".")
    around = [modules.get(".".join(steps[:k])) for k in range(1, len(steps))]
    if around and projects_at_once(around[-1]) and re.match(r"(to|add)_(q|k|v)", steps[-1]):
        return "is fused with others into one projection here: call unfuse_qkv_projections first"
    if any(isinstance(module, BaseTunerLayer) for module in around):
        return "is a part of another adapter here, not a layer of the model"
    if around and isinstance(around[-1], nn.MultiheadAttention):
        return "belongs to a torch.nn.MultiheadAttention here, which reads the weight past ETHER"
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        return f"is a grouped convolution here (groups={base.groups}); grouped convolutions are not reflected"
    if _width(base, "") is None or _width(base, "_out") is None:
        return f"is a {type(base).__name__} here, not a Linear or Conv2d to adapt"
    return None


def _width(base: nn.Module, vector: str) -> int | None:
    out = vector.endswith("_out")
    if isinstance(base, nn.Conv2d):
        return base.out_channels if out else base.in_channels
    return getattr(base, "out_features" if out else "in_features", None)


def _encoder_for(pipe: DiffusionPipeline, where: str, weights: ModuleWeights) -> AnyEncoder:
    """The encoder that sound weights of a file make up, in use on the pipeline's device.

    Raises:
        EtherFileError: a pipeline that applies no encoders, or of another architecture.
    """
    if not hasattr(pipe, "check_control"):
        raise EtherFileError(
            f"{where}: the adapter has a control encoder, which a {type(pipe).__name__} does not apply: load it onto "
            f"an {_with_control(pipe)}"
        )
    encoder = empty_encoder(weights.about)  # draws no random numbers for a start that is not kept
    if obstacle := pipe.check_control(encoder):
        raise EtherFileError(f"{where}: the encoder {obstacle}; it was made for another architecture")
    dtype = torch.get_default_dtype()
    encoder.load_state_dict({name: t.to(dtype, copy=True) for name, t in weights.tensors.items()}, assign=True)
    encoder.eval().requires_grad_(False)
    return encoder.to(pipe.device) if pipe.device.type != "meta" else encoder


def _with_control(pipe: DiffusionPipeline) -> str:
    """Names of the classes that apply control encoders, as far as they can be what is meant instead."""
    kind = CONTROL_PIPELINES.get(type(pipe).__name__)
    return "EtherControlPipeline (for SDXL, EtherControlXLPipeline)" if kind is None else kind.__name__


def _parameters_for(where: str, model: nn.Module, weights: ModuleWeights) -> dict[str, nn.Parameter]:
    """The parameters of a model that weights of modules are written over, once all is checked.

    Raises:
        EtherFileError: names the first module or parameter that does not fit.
    """
    found = replaceable_parameters(where, model, weights.about["modules"])
    if differing := sorted(set(found) ^ set(weights.tensors)):
        here, name = f"this {type(model).__name__}", differing[0]
        lacks = f"the file has no {name}, but {here} has" if name in found else f"{here} has no {name}"
        raise EtherFileError(f"{where}: {lacks}; the adapter was made for another architecture")
    for name, parameter in found.items():
        shape = tuple(weights.tensors[name].shape)
        if shape != tuple(parameter.shape):
            raise EtherFileError(
                f"{where}: {name} has shape {shape}, but the weight here has {tuple(parameter.shape)}; the adapter "
                "was made for another architecture"
            )
    return found
