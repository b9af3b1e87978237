"""Adapters on a pipeline's components: check a checkpoint against them, put it on, collect it, take it off."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.schema import DOCUMENT_FIELDS, ENCODER_FIELDS, AdapterFile, WholeWeights, canonical_path
from ether_diffusion.control.encoder import CONTROL, ControlEncoder
from ether_diffusion.control.pipelines import Control
from ether_diffusion.errors import EtherFileError
from ether_diffusion.files import MINIATURE_NAME, is_miniature
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.layer import EtherLayer

FINGERPRINT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's components that are modules, by name; of a compiled component, the module that was compiled."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: getattr(module, "_orig_mod", module) for name, module in modules.items()}


def ether_layers(model: nn.Module) -> Iterator[tuple[str, EtherLayer]]:
    """Names and ETHER layers of a model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, EtherLayer))


def controls_of(pipe: DiffusionPipeline) -> dict[str, Control]:
    """The pipeline's control encoders, by the names of their adapters; a stock pipeline has none."""
    return getattr(pipe, "controls", {})


def adapters_of(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """ETHER adapters and what carries them, the control encoder included: name -> components."""
    found: dict[str, list[str]] = {}
    for component, model in models_of(pipe).items():
        for name in dict.fromkeys(name for _, layer in ether_layers(model) for name in layer.ether_u):
            found.setdefault(name, []).append(component)
        if (held := held_whole(model)) and component not in found.setdefault(held.adapter_name, []):
            found[held.adapter_name].append(component)
    for name in controls_of(pipe):
        found.setdefault(name, []).append(CONTROL)
    return found


# Checks -------------------------------------------------------------------------------------------------------


def _resolve(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The name in this model of the module at a canonical path, in whichever release's naming the model has."""
    candidates = (path, path.removeprefix("text_model."), f"text_model.{path}")
    return next((name for name in candidates if name in modules), None)


def _layers_for(where: str, model: nn.Module, config: EtherConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Check one component's vectors, sound in themselves, against a model: module path in it -> vectors by name.

    Raises:
        EtherFileError: names the first module that does not fit, what the file has for it and what it would need.
    """
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, vector = key.rpartition(".")
        name = _resolve(modules, path)
        if name is None or "base_layer" in path.split("."):
            raise EtherFileError(
                f"{where}: {path} does not exist in this {type(model).__name__}; the adapter was made for another "
                "architecture"
            )
        if obstacle := _obstacle(modules, name):
            raise EtherFileError(f"{where}: {path} {obstacle}")
        width, n = _width(_base_of(modules[name]), vector), config.num_blocks
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


def _obstacle(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Why the module of this name cannot carry ETHER, in words, or None where it can."""
    base, steps = _base_of(modules[name]), name.split(".")
    around = [modules.get(".".join(steps[:k])) for k in range(1, len(steps))]
    if any(isinstance(module, BaseTunerLayer) for module in around):
        return "is a part of another adapter here, not a layer of the model"
    if around and isinstance(around[-1], nn.MultiheadAttention):
        return "belongs to a torch.nn.MultiheadAttention here, which reads the weight past ETHER"
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        return f"is a grouped convolution here (groups={base.groups}); grouped convolutions are not reflected"
    if _width(base, "") is None or _width(base, "_out") is None:
        return f"is a {type(base).__name__} here, not a Linear or Conv2d to adapt"
    return None


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_name(adapter_name: str) -> None:
    """Refuse a name that `nn.ParameterDict` cannot hold: its keys are attributes of the module.

    Raises:
        ValueError: names what is wrong.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: a name is a text without a dot")
    if hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(f"adapter_name={adapter_name!r} is taken by PyTorch's own attributes: choose another name")


def _width(base: nn.Module, vector: str) -> int | None:
    out = vector.endswith("_out")
    if isinstance(base, nn.Conv2d):
        return base.out_channels if out else base.in_channels
    return getattr(base, "out_features" if out else "in_features", None)


def _name_component(checkpoint: AdapterFile, models: Mapping[str, nn.Module]) -> AdapterFile:
    """Find the component of a checkpoint that does not name it, as the only one that it fits.

    Raises:
        EtherFileError: it fits none (says why of each), or several.
    """
    config, tensors = checkpoint.configs[None], checkpoint.tensors[None]
    fitting, reasons = [], []
    for component, model in models.items():
        try:
            _layers_for(component, model, config, tensors)
            fitting.append(component)
        except EtherFileError as error:
            reasons.append(str(error))
    if len(fitting) != 1:
        what = f"fits several components ({', '.join(fitting)})" if fitting else "fits no component of this pipeline"
        raise EtherFileError("; ".join([f"{checkpoint.source} {what}", *([] if fitting else reasons)]))
    component = fitting[0]
    return AdapterFile({component: config}, {component: tensors}, checkpoint.metadata, checkpoint.source)


def _encoder_for(pipe: DiffusionPipeline, where: str, whole: WholeWeights) -> ControlEncoder:
    """The encoder that sound weights of a checkpoint make up, once it is clear that it fits the pipeline.

    Raises:
        EtherFileError: a pipeline that holds no encoders, or of another architecture.
    """
    if not hasattr(pipe, "check_control"):
        raise EtherFileError(
            f"{where}: the adapter has a control encoder, which a {type(pipe).__name__} does not apply: load it onto "
            "an EtherControlPipeline (for SDXL, EtherControlXLPipeline)"
        )
    # The start that PyTorch draws is not the one that is kept.
    with torch.random.fork_rng(devices=[]):
        encoder = ControlEncoder(**whole.about["config"]).eval().requires_grad_(False)
    if obstacle := pipe.check_control(encoder):
        raise EtherFileError(f"{where}: the encoder {obstacle}; it was made for another architecture")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(whole.tensors[name])
    return encoder.to(pipe.device) if pipe.device.type != "meta" else encoder


def _parameters_for(where: str, model: nn.Module, whole: WholeWeights) -> dict[str, nn.Parameter]:
    """The parameters of a model that whole weights are written over, once all is checked.

    Raises:
        EtherFileError: names the first module or parameter that does not fit.
    """
    found = whole_parameters(where, model, whole.about["modules"])
    if differing := sorted(set(found) ^ set(whole.tensors)):
        here, name = f"this {type(model).__name__}", differing[0]
        lacks = f"the file has no {name}, but {here} has" if name in found else f"{here} has no {name}"
        raise EtherFileError(f"{where}: {lacks}; the adapter was made for another architecture")
    for name, parameter in found.items():
        shape = tuple(whole.tensors[name].shape)
        if shape != tuple(parameter.shape):
            raise EtherFileError(
                f"{where}: {name} has shape {shape}, but the weight here has {tuple(parameter.shape)}; the adapter "
                "was made for another architecture"
            )
    return found


def whole_parameters(where: str, model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """All parameters of some modules of a model, by their paths in it.

    Raises:
        EtherFileError: no such module, one without parameters, with an adapter in it, within another that is listed,
            quantised, or offloaded.
    """
    known, found = dict(model.named_modules()), {}
    for path in modules:
        if path not in known or path == "":
            raise EtherFileError(f"{where}: {path} does not exist in this {type(model).__name__}")
        own = {f"{path}.{name}": parameter for name, parameter in known[path].named_parameters()}
        if any(isinstance(module, BaseTunerLayer) for module in known[path].modules()):
            raise EtherFileError(f"{where}: {path} carries an adapter here, so its own weights cannot be replaced")
        if not own or set(own) & set(found):
            raise EtherFileError(f"{where}: {path} {'is listed twice' if own else 'has no parameters'}")
        for name, parameter in own.items():
            if parameter.is_meta or not parameter.is_floating_point():
                raise EtherFileError(
                    f"{where}: {name} is quantised or offloaded here: load the model without that first"
                )
        found |= own
    return found


def plan(pipe: DiffusionPipeline, checkpoint: AdapterFile) -> tuple[AdapterFile, dict[str, dict[str, dict]]]:
    """Check a checkpoint against a pipeline without changing it: component -> module path -> vectors.

    Raises:
        EtherFileError: whatever does not fit.
    """
    models = models_of(pipe)
    if None in checkpoint.configs:
        checkpoint = _name_component(checkpoint, models)
    if unknown := sorted((set(checkpoint.tensors) | set(checkpoint.weights)) - set(models) - {CONTROL}):
        raise EtherFileError(
            f"{checkpoint.source} adapts {', '.join(unknown)}, which this {type(pipe).__name__} does not have; it has "
            f"{', '.join(models)}"
        )
    found = {
        component: _layers_for(
            f"{checkpoint.source}: {component}", models[component], checkpoint.configs[component], tensors
        )
        for component, tensors in checkpoint.tensors.items()
    }
    for component, whole in checkpoint.weights.items():
        where = f"{checkpoint.source}: {component}"
        if component == CONTROL:
            _encoder_for(pipe, where, whole)
        else:
            _parameters_for(where, models[component], whole)
    return checkpoint, found


# Putting on and taking off ------------------------------------------------------------------------------------


def free_name(pipe: DiffusionPipeline) -> str:
    taken = {name for model in models_of(pipe).values() for name in getattr(model, "peft_config", {})}
    taken |= set(adapters_of(pipe))
    return next(name for k in range(len(taken) + 1) if (name := f"default_{k}") not in taken)


def attach(
    pipe: DiffusionPipeline, checkpoint: AdapterFile, adapter_name: str, *, low_cpu_mem_usage: bool = True
) -> None:
    """Check everything, then add the adapter to every component it has vectors for, and make it the active one.

    Raises:
        ValueError: the name is taken, or the checkpoint does not fit. Nothing has changed then.
    """
    _check_name(adapter_name)
    models = models_of(pipe)
    for component, model in models.items():
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"an adapter called {adapter_name!r} is already on {component}: choose another name")
        if any(layer.merged for _, layer in ether_layers(model)):
            raise ValueError(f"{component} has a fused ETHER adapter: call unfuse_ether before loading another")
    if adapter_name in adapters_of(pipe):
        raise ValueError(f"an adapter called {adapter_name!r} is already on this pipeline: choose another name")
    for component in checkpoint.weights:
        if held := held_whole(models[component]) if component in models else None:
            raise ValueError(
                f"{component}: {', '.join(held.modules)} are those of the adapter {held.adapter_name!r}, and only one "
                "adapter can replace weights of a component: delete it first (delete_adapters)"
            )
    checkpoint, found = plan(pipe, checkpoint)
    active = {component: _activation(models[component]) for component in found}
    controls = {name: control.active for name, control in controls_of(pipe).items()}
    try:
        for component, layers in found.items():
            _inject(models[component], checkpoint.configs[component], layers, adapter_name, low_cpu_mem_usage)
            models[component].peft_config[adapter_name].said = _said(checkpoint)
        for component, whole in checkpoint.weights.items():
            where = f"{checkpoint.source}: {component}"
            if component == CONTROL:
                pipe.add_control(adapter_name, _encoder_for(pipe, where, whole))
                pipe.controls[adapter_name].said = _said(checkpoint)
            else:
                _replace_whole(models[component], where, whole, adapter_name, _said(checkpoint))
        for name, control in controls_of(pipe).items():
            control.active = name == adapter_name
    except BaseException:
        controls_of(pipe).pop(adapter_name, None)
        for name, was in controls.items():
            pipe.controls[name].active = was
        for component in set(checkpoint.weights) - set(found) - {CONTROL}:
            detach(models[component], adapter_name)
        for component in found:
            detach(models[component], adapter_name)
            for layer, (names, trained) in active[component].items():
                layer._active_adapter = names
                for parameter, requires_grad in trained:
                    parameter.requires_grad_(requires_grad)
        raise


WHOLE = "_ether_whole"


@dataclass
class HeldWhole:
    """On a model: the adapter whose weights stand in some of its modules, and what stood there before."""

    adapter_name: str
    modules: list[str]
    originals: dict[str, Tensor]
    said: dict[str, Any] = field(default_factory=dict)

    def places(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Where the originals belong, found by name: offloading exchanges parameters, and adapters wrap modules.

        Raises:
            ValueError: weights that are fused, or on the meta device. Nothing has changed then.
        """
        now = {without_base_layer(name): parameter for name, parameter in model.named_parameters()}
        places = {name: now[name] for name in self.originals}
        if offloaded := next((name for name, parameter in places.items() if parameter.is_meta), None):
            raise ValueError(f"{offloaded} is offloaded, and cannot be put back: end the offloading first")
        for path, layer in ether_layers(model):
            if layer.merged and f"{without_base_layer(path)}.weight" in places:
                raise ValueError(f"{path} has a fused ETHER adapter, and cannot be put back: call unfuse_ether first")
        return places


def held_whole(model: nn.Module) -> HeldWhole | None:
    """What an adapter replaced in a model, if any did."""
    return model.__dict__.get(WHOLE)


def _replace_whole(model: nn.Module, where: str, whole: WholeWeights, adapter_name: str, said: dict[str, Any]) -> None:
    parameters = _parameters_for(where, model, whole)
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    setattr(model, WHOLE, HeldWhole(adapter_name, list(whole.about["modules"]), originals, said))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(whole.tensors[name])


def _activation(model: nn.Module) -> dict[BaseTunerLayer, tuple[Any, list[tuple[nn.Parameter, bool]]]]:
    """Of every PEFT layer: what is active, and which of its parameters are trained."""
    return {
        layer: (layer._active_adapter, [(p, p.requires_grad) for p in layer.parameters()])
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    }


def _inject(
    model: nn.Module, config: EtherConfig, layers: Mapping[str, dict], adapter_name: str, low_cpu_mem_usage: bool
) -> None:
    fields = {name: getattr(config, name) for name in ("method", "num_blocks", "sides")}
    exact = EtherConfig(**fields, target_modules=list(layers), inference_mode=True)
    # The start that PEFT draws, on the CPU, is not the one that is kept.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config` attribute"
        )  # a second adapter is fine
        inject_adapter_in_model(exact, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    if config.target_modules is not None:
        exact.target_modules = config.target_modules
    modules = dict(model.named_modules())
    for path, vectors in layers.items():
        layer = modules[path]
        device = _execution_device(path, layer.get_base_layer())
        for name, tensor in vectors.items():
            # A copy: the caller's tensors, and a memory-mapped file, stay apart from the model.
            getattr(layer, name)[adapter_name] = nn.Parameter(
                tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False
            )
        layer._move_adapter_to_device_of_base_layer(adapter_name, device)
    if hasattr(type(model), "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    _maybe_remove_and_reapply_group_offloading(model)


def swap(pipe: DiffusionPipeline, checkpoint: AdapterFile, adapter_name: str) -> None:
    """Check everything, then write the checkpoint's vectors over those of an adapter, in place.

    No module, parameter or strength changes, so nothing that is compiled has to be compiled again.

    Raises:
        ValueError: no such adapter, or one with other layers, vectors or blocks, fused, or offloaded. Nothing has
            changed then.
    """
    if adapter_name not in adapters_of(pipe):
        loaded = ", ".join(adapters_of(pipe)) or "none"
        raise ValueError(f"hotswap: there is no adapter {adapter_name!r} to replace; loaded are {loaded}")
    checkpoint, found = plan(pipe, checkpoint)
    targets: list[tuple[Tensor, Tensor]] = []
    for component, model in models_of(pipe).items():
        layers = {without_base_layer(p): la for p, la in ether_layers(model) if adapter_name in la.ether_u}
        new = {without_base_layer(path): vectors for path, vectors in found.get(component, {}).items()}
        if differing := sorted(set(layers) ^ set(new)):
            raise ValueError(
                f"hotswap: {checkpoint.source} and the adapter {adapter_name!r} do not have the same layers, e.g. "
                f"{component}: {differing[0]}; load it under another name"
            )
        for path, vectors in new.items():
            old = {name: getattr(layers[path], name) for name in layers[path].adapter_layer_names}
            shapes = {name: tuple(old[name][adapter_name].shape) for name in old if adapter_name in old[name]}
            if shapes != {name: tuple(vector.shape) for name, vector in vectors.items()}:
                raise ValueError(
                    f"hotswap: {component}: {path} has vectors {shapes} here, but {checkpoint.source} has "
                    f"{ {name: tuple(vector.shape) for name, vector in vectors.items()} }; load it under another name"
                )
            if layers[path].merged or any(old[name][adapter_name].is_meta for name in vectors):
                raise ValueError(f"hotswap: {component}: {path} is fused or offloaded; undo that first")
            targets += [(old[name][adapter_name], vector) for name, vector in vectors.items()]
    targets += _whole_targets(pipe, checkpoint, adapter_name)
    with torch.no_grad():
        for parameter, vector in targets:
            parameter.copy_(vector)
    for component in found:
        models_of(pipe)[component].peft_config[adapter_name].said = _said(checkpoint)
    for component in checkpoint.weights:
        held = controls_of(pipe)[adapter_name] if component == CONTROL else held_whole(models_of(pipe)[component])
        held.said = _said(checkpoint)


def _whole_targets(pipe: DiffusionPipeline, checkpoint: AdapterFile, adapter_name: str) -> list[tuple[Tensor, Tensor]]:
    """The parameters that a checkpoint's whole weights would be written over, each with its tensor.

    Raises:
        ValueError: the adapter does not hold weights of the same kind.
    """
    models, now = models_of(pipe), whole_of(pipe, adapter_name)
    here = {component: whole.about for component, whole in now.items()}
    if here != (new := {component: _tidy(whole.about) for component, whole in checkpoint.weights.items()}):
        raise ValueError(
            f"hotswap: {checkpoint.source} holds the whole weights {new}, but the adapter {adapter_name!r} {here}; "
            "load it under another name"
        )
    targets: list[tuple[Tensor, Tensor]] = []
    for component, whole in checkpoint.weights.items():
        if component == CONTROL:
            own = dict(controls_of(pipe)[adapter_name].encoder.named_parameters())
        else:
            own = _parameters_for(f"{checkpoint.source}: {component}", models[component], whole)
        targets += [(own[name], tensor) for name, tensor in whole.tensors.items()]
    return targets


def _said(checkpoint: AdapterFile) -> dict[str, Any]:
    """What a file's writer added to it (the prompt), which it says again when it is saved from the pipeline."""
    return {name: value for name, value in checkpoint.metadata.items() if name not in DOCUMENT_FIELDS}


def without_base_layer(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _execution_device(path: str, base: nn.Module) -> torch.device | None:
    """Where an offloaded layer computes, whose weight waits on the meta device; None: where its weight is.

    Raises:
        ValueError: a weight on the meta device that nothing brings anywhere.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "meta":
        return None
    hook = getattr(base, "_hf_hook", None)
    devices = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", [hook])]
    if not any(device is not None for device in devices):
        raise ValueError(f"{path} has no weights (they are on the meta device): load the model's weights first")
    return torch.device(next(device for device in devices if device is not None))


def detach(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one ETHER adapter, or all; a layer without any becomes what it wrapped, unmerged.

    Where no adapter of any method is left, the model's own attributes are as they were before the first. Weights that
    the adapter replaced are put back.
    """
    for path, layer in reversed(list(ether_layers(model))):  # inner ones first: paths lead through the outer ones
        if layer.merged:
            layer.unmerge()
        for name in [adapter_name] if adapter_name else list(layer.ether_u):
            if name in layer.ether_u:
                layer.delete_adapter(name)
        if not layer.ether_u:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    if (held := held_whole(model)) and adapter_name in (None, held.adapter_name):
        with torch.no_grad():
            for name, parameter in held.places(model).items():
                parameter.copy_(held.originals[name])
        del model.__dict__[WHOLE]
    configs = getattr(model, "peft_config", {})
    ours = [name for name, config in configs.items() if isinstance(config, EtherConfig)]
    forget(model, [name for name in ours if adapter_name in (None, name)])


def forget(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """After adapters' layers are off: remove their configs, and with the last one all that PEFT put on the model."""
    configs = getattr(model, "peft_config", {})
    for name in adapter_names:
        del configs[name]
    if not configs:
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(attribute, None)
    _maybe_remove_and_reapply_group_offloading(model)


# Collecting ---------------------------------------------------------------------------------------------------


def _tidy(about: Mapping[str, Any]) -> dict[str, Any]:
    """An entry on whole weights in the one form that two of them can be compared in."""
    if "modules" in about:
        return {"modules": sorted(about["modules"])}
    config = {name: about["config"][name] for name in ENCODER_FIELDS}
    return {"config": config | {"block_out_channels": list(config["block_out_channels"])}}


def whole_of(
    pipe: DiffusionPipeline, adapter_name: str, modules: Mapping[str, Sequence[str]] | None = None
) -> dict[str, WholeWeights]:
    """What an adapter holds besides vectors: its control encoder, and modules of components.

    Args:
        modules: more of the latter, by component: they were trained in place.

    Raises:
        ValueError: a component or module that is not there, or cannot be held.
    """
    weights, models = {}, models_of(pipe)
    if control := controls_of(pipe).get(adapter_name):
        config = _tidy({"config": control.encoder.config})
        tensors = {name: p.detach() for name, p in control.encoder.named_parameters()}
        weights[CONTROL] = WholeWeights(config, tensors)
    chosen: dict[str, set[str]] = {}
    for component, model in models.items():
        if (held := held_whole(model)) and held.adapter_name == adapter_name:
            chosen[component] = set(held.modules)
    for component, paths in (modules or {}).items():
        if component not in models or isinstance(paths, str) or not paths:
            raise ValueError(
                f"whole_modules: {component}: {paths!r}: a list of module paths of one of {', '.join(models)} fits"
            )
        chosen[component] = chosen.get(component, set()) | set(paths)
    for component, paths in sorted(chosen.items()):
        parameters = whole_parameters(f"whole_modules: {component}", models[component], sorted(paths))
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        weights[component] = WholeWeights({"modules": sorted(paths)}, tensors)
    return weights


def collect(
    pipe: DiffusionPipeline, adapter_name: str, whole_modules: Mapping[str, Sequence[str]] | None = None
) -> AdapterFile:
    """The named adapter as it is on the pipeline, with what identifies its base model."""
    configs: dict[str | None, EtherConfig] = {}
    tensors: dict[str | None, dict[str, Tensor]] = {}
    fingerprints: dict[str, dict[str, str]] = {}
    models = models_of(pipe)
    for component in adapters_of(pipe).get(adapter_name, ()):
        if adapter_name not in getattr(model := models.get(component), "peft_config", {}):
            continue  # the adapter has whole weights of it alone
        layers = {
            canonical_path(component, path): layer
            for path, layer in ether_layers(model)
            if adapter_name in layer.ether_u
        }
        configs[component] = model.peft_config[adapter_name]
        tensors[component] = {
            f"{path}.ether_{name}": vector.detach()
            for path, layer in layers.items()
            for name, vector in layer.vectors(adapter_name).named().items()
        }
        fingerprints[component] = fingerprint(layers)
    said = {name: value for config in configs.values() for name, value in getattr(config, "said", {}).items()}
    held = [held_whole(model) for model in models.values()] + [controls_of(pipe).get(adapter_name)]
    for each in held:
        said |= each.said if each and getattr(each, "adapter_name", adapter_name) == adapter_name else {}
    metadata = said | {"base_model": base_model_name(pipe), "base_fingerprint": fingerprints}
    return AdapterFile(configs, tensors, metadata, weights=whole_of(pipe, adapter_name, whole_modules))


def fingerprint(layers: Mapping[str, EtherLayer], dtypes: Iterable[str] = tuple(FINGERPRINT_DTYPES)) -> dict[str, str]:
    """SHA-256 over the base weights of adapted layers (path, shape, values), by the dtype they are rounded to.

    A float32 model has one for each half precision, so that its own half-precision copies are recognised; a model in
    half precision has its own alone, a quantised or offloaded one none.
    """
    weights = {path: layer._pristine_weight() for path, layer in sorted(layers.items())}
    if any(w.device.type == "meta" or not w.is_floating_point() for w in weights.values()):
        return {}
    prints = {}
    for name in dtypes:
        dtype = FINGERPRINT_DTYPES[name]
        if all(w.dtype in (dtype, torch.float32, torch.float64) for w in weights.values()):
            total = hashlib.sha256()
            for path, weight in weights.items():
                total.update(f"\0{path}\0{tuple(weight.shape)}\0".encode())
                total.update(weight.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
            prints[name] = total.hexdigest()
    return prints


def other_base(pipe: DiffusionPipeline, adapter_name: str, metadata: Mapping[str, Any]) -> list[str]:
    """Components whose base weights are not those that the adapter was made on, as far as can be told."""
    recorded = metadata.get("base_fingerprint")
    if not isinstance(recorded, dict):
        return []
    differing = []
    for component, model in models_of(pipe).items():
        layers = {canonical_path(component, p): la for p, la in ether_layers(model) if adapter_name in la.ether_u}
        then = recorded.get(component)
        if layers and isinstance(then, dict):
            compared = [
                now[n] == then[n] for n in FINGERPRINT_DTYPES if n in then if (now := fingerprint(layers, [n]))
            ]
            differing += [component] if compared and not any(compared) else []
    return differing


def base_model_name(pipe: DiffusionPipeline) -> str | None:
    """Hub id of the base model, or the name of its folder: a path says nothing on another machine."""
    name = getattr(pipe.config, "_name_or_path", None)
    if not name:
        return None
    if is_miniature(name):
        return MINIATURE_NAME
    return Path(name).name if Path(name).is_dir() else str(name)
