"""Attach adapters to the components of a pipeline, exchange them in place, and detach them. All or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor, nn

from ether_diffusion.adapters.components import (
    AdapterRecord,
    ReplacedModules,
    check_name,
    check_removable,
    drop_record,
    ether_layers,
    keep_record,
    models_of,
    named,
    records_of,
    tuner_layers,
)
from ether_diffusion.adapters.encoder_entry import about_encoder
from ether_diffusion.adapters.fit import fit
from ether_diffusion.adapters.schema import AdapterFile, Document, without_base_layer
from ether_diffusion.control.encoder import CONTROL, AnyEncoder
from ether_diffusion.control.pipelines import Control
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.guards import guard
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.merging import check_unmergeable
from ether_diffusion.tuner.model import layer_class


@torch.inference_mode(False)  # tensors made in it could not be written over later
def attach(pipe: DiffusionPipeline, file: AdapterFile, adapter_name: str, *, autocast: bool = True) -> AdapterRecord:
    """Check everything, then add the adapter to every component that it is for, and make it the active one.

    Args:
        autocast: vectors in float32; else in the dtypes of the layers.

    Raises:
        ValueError: the name is taken, or the file does not fit. Nothing has changed then.
    """
    check_name(adapter_name)
    models, records = models_of(pipe), records_of(pipe)
    _check_free(models, records, file, adapter_name)
    fitted = fit(pipe, file)
    file, record = fitted.file, AdapterRecord(adapter_name, other_base=fitted.other_base)
    record.metadata = _writers_metadata(file)
    with ExitStack() as undo:  # runs what was registered, the last first, unless all went well
        for component, layers in fitted.layers.items():
            undo.callback(_activation_of(models[component]))
            undo.callback(_detach_layers, models[component], [adapter_name])
            _attach_layers(models[component], file.configs[component], layers, adapter_name, autocast)
        for component, parameters in fitted.parameters.items():
            originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            record.replaced[component] = ReplacedModules(list(file.weights[component].about["modules"]), originals)
            undo.callback(_write, parameters, originals)
            _write(parameters, file.weights[component].tensors)
        if fitted.encoder is not None:
            record.control = Control(fitted.encoder, enabled=_enabled(records.values()))
        undo.pop_all()
    for component in fitted.layers:  # from here on nothing can fail
        _activate(models[component], adapter_name)
    for other in records.values():
        if other.control is not None:
            other.control.active = False
    keep_record(pipe, record, [*fitted.layers, *fitted.parameters])
    return record


def _check_free(
    models: Mapping[str, nn.Module], records: Mapping[str, AdapterRecord], file: AdapterFile, adapter_name: str
) -> None:
    """Raise `ValueError` where another adapter is in the way of one of this name."""
    for component, model in models.items():
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"an adapter called {adapter_name!r} is already on {component}: choose another name")
        if any(layer.merged for _, layer in ether_layers(model)):
            raise ValueError(f"{component} has a fused ETHER adapter: call unfuse_ether before loading another")
    if adapter_name in records:
        raise ValueError(f"an adapter called {adapter_name!r} is already on this pipeline: choose another name")
    for component in file.weights:
        for record in records.values():
            if component in record.replaced:
                raise ValueError(
                    f"{component}: {', '.join(record.replaced[component].modules)} are those of the adapter "
                    f"{record.name!r}, and only one adapter can replace modules of a component: delete it first "
                    "(delete_adapters)"
                )


def add_control(pipe: DiffusionPipeline, adapter_name: str, encoder: AnyEncoder) -> None:
    """Register a control encoder, as it is and in use, under the name of an adapter of the pipeline, or of none.

    Raises:
        ValueError: a name that is taken or cannot be one, or an encoder that does not fit.
    """
    if not isinstance(encoder, AnyEncoder):
        raise ValueError(
            f"add_control: got a {type(encoder).__name__}, needs a ControlEncoder or a LatentControlEncoder"
        )
    check_name(adapter_name)
    records = records_of(pipe)
    record = records.get(adapter_name) or AdapterRecord(adapter_name)
    if record.control is not None:
        raise ValueError(f"the adapter {adapter_name!r} has a control encoder already: choose another name")
    if obstacle := pipe.check_control(encoder):
        raise ValueError(f"add_control: the encoder {obstacle}")
    record.control = Control(encoder, enabled=_enabled(records.values()))
    keep_record(pipe, record, [*record.configs, *record.replaced])


@torch.inference_mode(False)
def hotswap(pipe: DiffusionPipeline, file: AdapterFile, adapter_name: str) -> AdapterRecord:
    """Check everything, then write a file's vectors over those of an adapter, in place.

    No module, parameter or strength changes, so nothing that is compiled has to be compiled again.

    Raises:
        ValueError: no such adapter, or one with other layers, vectors or blocks, fused, or offloaded. Nothing has
            changed then.
    """
    records = records_of(pipe)
    try:
        named(adapter_name, records)
    except ValueError as error:
        raise ValueError(f"hotswap: {error}") from error
    fitted, record = fit(pipe, file), records[adapter_name]
    source, targets = fitted.file.source, []
    for component, model in models_of(pipe).items():
        layers = {without_base_layer(p): la for p, la in ether_layers(model) if adapter_name in la.ether_u}
        new = {without_base_layer(path): vectors for path, vectors in fitted.layers.get(component, {}).items()}
        if differing := sorted(set(layers) ^ set(new)):
            raise ValueError(
                f"hotswap: {source} and the adapter {adapter_name!r} do not have the same layers, e.g. "
                f"{component}: {differing[0]}; load it under another name"
            )
        for path, vectors in new.items():
            where = f"hotswap: {component}: {path}"
            targets += _vector_targets(where, source, layers[path], vectors, adapter_name)
    replaced = {component: sorted(each.modules) for component, each in record.replaced.items()}
    here = replaced | ({CONTROL: about_encoder(record.control.encoder)} if record.control is not None else {})
    new = {
        component: sorted(weights.about["modules"]) if component != CONTROL else about_encoder(fitted.encoder)
        for component, weights in fitted.file.weights.items()
    }
    if here != new:
        raise ValueError(
            f"hotswap: {source} replaces the modules {new}, but the adapter {adapter_name!r} {here}; load it under "
            "another name"
        )
    for component, weights in fitted.file.weights.items():
        own = fitted.parameters.get(component) or dict(record.control.encoder.named_parameters())
        targets += [(own[name], tensor) for name, tensor in weights.tensors.items()]
    if any(parameter.is_inference() for parameter, _ in targets):
        raise ValueError(f"hotswap: {adapter_name!r} was made in inference mode: delete it and load the other instead")
    with torch.no_grad():
        for parameter, tensor in targets:
            parameter.copy_(tensor)
    record.metadata, record.other_base = _writers_metadata(fitted.file), fitted.other_base
    keep_record(pipe, record, [*record.configs, *record.replaced])
    return record


def _vector_targets(
    where: str, source: str, layer: EtherLayer, vectors: Mapping[str, Tensor], adapter_name: str
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of a layer that vectors are written over, each with its vector."""
    old = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    shapes = {name: tuple(old[name][adapter_name].shape) for name in old if adapter_name in old[name]}
    new = {name: tuple(vector.shape) for name, vector in vectors.items()}
    if shapes != new:
        raise ValueError(f"{where} has vectors {shapes} here, but {source} has {new}; load it under another name")
    if layer.merged or any(old[name][adapter_name].is_meta for name in vectors):
        raise ValueError(f"{where} is fused or offloaded; undo that first")
    return [(old[name][adapter_name], vector) for name, vector in vectors.items()]


@torch.inference_mode(False)
def detach(pipe: DiffusionPipeline, adapter_names: Iterable[str]) -> None:
    """Remove ETHER adapters: vectors, replaced modules (whose own weights come back) and control encoders.

    A layer without any is what it wrapped again, unmerged. Where no adapter of any method is left on a model, its
    attributes are as they were before the first; its parameters stay frozen, as PEFT leaves them.

    Raises:
        ValueError: weights that cannot be put back (offloaded, or their file has changed), or the own adapter of a
            component that is a `PeftModel`. Nothing has changed then.
    """
    models, records, names = models_of(pipe), records_of(pipe), list(adapter_names)
    check_removable(pipe, names)
    chosen = [records[name] for name in names]
    back = [
        (replaced.parameters(models[component], names), replaced.originals)
        for record in chosen
        for component, replaced in record.replaced.items()
    ]
    layers = [layer for model in models.values() for _, layer in ether_layers(model) if layer.merged]
    for layer in layers:
        check_unmergeable(layer)
    for component, model in models.items():
        if own := [record.name for record in chosen if component in record.configs]:
            _detach_layers(model, own)
    for parameters, originals in back:
        _write(parameters, originals)
    for name in names:
        drop_record(pipe, name)


def forget(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """After adapters' layers are off: remove their configs, and with the last one all that PEFT put on the model."""
    configs = getattr(model, "peft_config", {})
    for name in adapter_names:
        configs.pop(name, None)
    if not configs:
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(attribute, None)
    _maybe_remove_and_reapply_group_offloading(model)


def _attach_layers(
    model: nn.Module,
    config: EtherConfig,
    layers: Mapping[str, Mapping[str, Tensor]],
    adapter_name: str,
    autocast: bool,
) -> None:
    """Put vectors on exactly these layers.

    Not by PEFT's `inject_adapter_in_model`: it takes paths for endings of names, draws random numbers, and changes
    PyTorch's classes while it runs, which other threads would see.
    """
    guard(model)
    modules = dict(model.named_modules())
    if not tuner_layers(model):
        model.requires_grad_(False)  # as PEFT's first adapter does
    for path, vectors in layers.items():
        target = modules[path]
        if isinstance(target, EtherLayer):
            target.update_layer(adapter_name, config, path, vectors)
            layer = target
        else:
            layer = layer_class(target, path)(target, adapter_name, config, path, vectors).train(target.training)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        layer.set_autocast(adapter_name, autocast)
        device = _execution_device(path, layer.get_base_layer())
        layer._move_adapter_to_device_of_base_layer(adapter_name, device)
    kept = EtherConfig(**{name: getattr(config, name) for name in ("method", "num_blocks", "sides", "target_modules")})
    kept.inference_mode = True
    targets = kept.target_modules
    if targets is None or not isinstance(targets, str) and not all(_is_ending(each, layers) for each in targets):
        kept.target_modules = set(layers)  # the file's are as another release of transformers names them
    if not hasattr(model, "peft_config"):
        model.peft_config = {}
    model.peft_config[adapter_name] = kept
    if hasattr(type(model), "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    _maybe_remove_and_reapply_group_offloading(model)


def _is_ending(target: str, paths: Iterable[str]) -> bool:
    """Whether PEFT takes a target to mean one of these paths."""
    return any(f".{path}".endswith(f".{target}") for path in paths)


def _activate(model: nn.Module, adapter_name: str) -> None:
    """Make an adapter the active one of a model. What is trained stays trained, as with PEFT."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in tuner_layers(model):
        layer.set_adapter([adapter_name])
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _detach_layers(model: nn.Module, adapter_names: Iterable[str]) -> None:
    names = list(adapter_names)
    for path, layer in reversed(list(ether_layers(model))):  # inner ones first: paths lead through the outer ones
        if layer.merged:
            layer.unmerge()
        for name in names:
            if name in layer.ether_u:
                layer.delete_adapter(name)
        if not layer.ether_u:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    forget(model, names)


def _activation_of(model: nn.Module) -> Callable[[], None]:
    """What brings back which adapters of a model are active, and what of it is trained."""
    active = [(layer, layer._active_adapter) for layer in tuner_layers(model)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for layer, names in active:
            layer._active_adapter = names
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


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


def _write(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        # What was made in inference mode can be written over in it alone, and what was made outside also outside.
        with torch.inference_mode() if parameter.is_inference() else torch.no_grad():
            parameter.copy_(tensors[name])


def _enabled(records: Iterable[AdapterRecord]) -> bool:
    """Whether control encoders are enabled: one that is added shares the state of those that are there."""
    return all(record.control.enabled for record in records if record.control is not None)


def _writers_metadata(file: AdapterFile) -> dict[str, Any]:
    """What a file's writer added to it (the prompt), which is written again when it is saved from the pipeline."""
    return {name: value for name, value in file.metadata.items() if name not in Document.model_fields}
