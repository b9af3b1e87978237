"""Which adapters are active, and how strong: the pipeline's methods for it, over every component that carries one.

Diffusers has most of these on its LoRA mixins, for the components that LoRA files know. A pipeline that carries no
ETHER is left to them. With ETHER on it, ours answer for all adapters of all components: ControlNets too, control
encoders, pipelines without a LoRA mixin, and LoRA beside ETHER.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.utils.peft_utils import delete_adapter_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.attach import detach
from ether_diffusion.adapters.components import (
    check_removable,
    ether_layers,
    models_of,
    named,
    names_of,
    peft_adapters,
    records_of,
    tuner_layers,
)
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.control.pipelines import Control, is_number
from ether_diffusion.tuner.layer import EtherLayer

logger = logging.getLogger(__name__)

Weight = float | Mapping[str, Any] | None


def stock(pipe: DiffusionPipeline, method: str) -> Callable | None:
    """The method that the pipeline has of diffusers' mixins, where it has one."""
    order = type(pipe).__mro__
    for kind in order[order.index(DiffusionPipeline) + 1 :]:
        if method in kind.__dict__:
            return getattr(kind, method).__get__(pipe)
    return None


def _adapted_models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: model for name, model in models_of(pipe).items() if getattr(model, "peft_config", None)}


def _controls(pipe: DiffusionPipeline) -> dict[str, Control]:
    return {name: record.control for name, record in records_of(pipe).items() if record.control is not None}


def _known(pipe: DiffusionPipeline) -> list[str]:
    return list(dict.fromkeys([*peft_adapters(pipe), *records_of(pipe)]))


def set_adapters(
    self: DiffusionPipeline,
    adapter_names: Sequence[str] | str,
    adapter_weights: Weight | list[Weight] = None,
) -> None:
    """Make adapters the active ones, with their strengths; all others are inactive.

    Args:
        adapter_names: one name, or several in the order in which they act.
        adapter_weights: a strength for all, or a list of one for each. A strength is a number; or numbers by
            component, `{"unet": 0.8, "text_encoder": 0.5, "control_encoder": 1.0}`; and a UNet's may be by block,
            `{"unet": {"down": 0.8, "mid": 1.0, "up": {"block_0": 0.6}}}`. Default: 1. One for a component that
            nothing adapts is ignored, with a warning.

    Layers outside the blocks, such as `conv_in`, act at strength 1 where weights are given by block. Transformers and
    text encoders have no such blocks: their strengths are by module path,
    `{"transformer": {"transformer_blocks.0": 0.5}}`, and all other layers act at strength 1.

    Raises:
        ValueError: an unknown adapter or component, a name given twice, lists of different lengths, a strength that
            is no finite number, or one other than 1 for an adapter of a method on which PEFT sets none. Nothing is
            changed then.
    """
    if not records_of(self) and (method := stock(self, "set_adapters")):
        return method(adapter_names, adapter_weights)
    names, models, controls = named(adapter_names, _known(self)), _adapted_models(self), _controls(self)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"adapter_names: {', '.join(twice)} is named more than once: an adapter acts once")
    carrying = [*models, *([CONTROL] if controls else [])]
    by_component = _weights_by_component(self, names, adapter_weights, carrying)
    strengths = {}
    for name, weight in zip(names, by_component, strict=True):
        value = weight.get(CONTROL)
        if name in controls and value is not None and not is_number(value):
            raise ValueError(f"adapter_weights: {name}: got {value!r} for its encoder, needs a finite number")
        strengths[name] = 1.0 if value is None else value
    planned = []
    for component, model in models.items():
        own = [1.0 if weight.get(component) is None else weight[component] for weight in by_component]
        planned += _strengths_of_layers(component, model, names, own)
    given = {component for weight in by_component for component in weight}
    if idle := sorted(given - set(carrying)):  # such as the text encoder's, where another pipeline has encoded
        logger.warning("adapter_weights: no adapter is on %s; the strength for it is ignored", ", ".join(idle))
    for layer, scales in planned:
        layer.set_adapter(names)
        for name, scale in scales.items():
            layer.set_scale(name, scale)
    for name, control in controls.items():
        control.active = name in names
        control.weight = float(strengths.get(name, control.weight))
    return None


def _weights_by_component(
    pipe: DiffusionPipeline, names: Sequence[str], adapter_weights: Weight | list[Weight], carrying: Sequence[str]
) -> list[dict[str, Any]]:
    """Component -> strength of each adapter, as `set_adapters` takes them; every number in them is finite.

    carrying: the components that carry an adapter.
    """
    if isinstance(adapter_weights, tuple):
        raise ValueError(
            f"adapter_weights: got a tuple, needs a number, numbers by component, or a list: {list(adapter_weights)}"
        )
    weights = list(adapter_weights) if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters ({', '.join(names)}), but {len(weights)} weights")
    first = names_of(pipe)
    by_component = [
        {first.get(component, component): value for component, value in weight.items()}
        if isinstance(weight, Mapping)
        else dict.fromkeys(carrying, weight)
        for weight in weights
    ]
    given = {component for weight in by_component for component in weight}
    if unknown := sorted(map(str, given - {*pipe.components, CONTROL})):
        raise ValueError(
            f"adapter_weights: {', '.join(unknown)} is no component of this {type(pipe).__name__}; those that carry "
            f"an adapter are {', '.join(carrying)}"
        )
    for name, weight in zip(names, by_component, strict=True):
        for component, value in weight.items():
            _check_numbers(name, component, value)
    return by_component


def _strengths_of_layers(
    component: str, model: nn.Module, names: Sequence[str], weights: Sequence[Any]
) -> list[tuple[BaseTunerLayer, dict[str, float]]]:
    """The strength of every named adapter on each adapted layer that has it, all of them checked."""
    expand = _SET_ADAPTER_SCALE_FN_MAPPING.get(type(model).__name__)  # of UNets, blocks to paths
    check = _check_paths if expand is None else _check_blocks
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, Mapping):
            check(component, model, name, weight)
    by_path = expand(model, list(weights)) if names and expand else weights
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        scales = {}
        for name, weight in zip(names, by_path, strict=True):
            if name not in layer._get_available_adapters():
                continue
            if isinstance(weight, Mapping):
                weight = next((value for prefix, value in weight.items() if _lies_in(path, prefix)), 1.0)
            if not is_number(weight):
                raise ValueError(f"adapter_weights: {name}: got {weight!r} for {component}, needs a finite number")
            if hasattr(layer, "scaling") and hasattr(layer, "set_scale"):  # OFT has the method without what it sets
                scales[name] = float(weight)
            elif weight != 1:
                raise ValueError(
                    f"adapter_weights: {name}: PEFT sets no strength on its method "
                    f"({type(layer).__module__.split('.')[-2].upper()}), but {component} got {weight!r}: leave it at 1"
                )
        found.append((layer, scales))
    return found


def _lies_in(path: str, part: str) -> bool:
    """Whether a path has these steps in it, whole: `single_transformer_blocks.0` is not in `transformer_blocks.0`."""
    return f".{part}." in f".{path}."


def _check_numbers(name: str, component: str, value: Any, *, outer: bool = True) -> None:
    """Refuse a strength that is none, wherever it stands, and whether or not it will act."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_numbers(name, component, inner, outer=False)
    elif not is_number(value) and not (outer and value is None):
        raise ValueError(f"adapter_weights: {name}: got {value!r} for {component}, needs a finite number")


def _check_paths(component: str, model: nn.Module, name: str, weight: Mapping[str, Any]) -> None:
    """Refuse strengths by module path that would act nowhere."""
    paths = [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in layer._get_available_adapters()
    ]
    for prefix in weight:
        if not any(_lies_in(path, prefix) for path in paths):
            there = f"those there are {', '.join(paths[:2])}, …" if paths else "it has none there"
            raise ValueError(f"adapter_weights: {name}: {component} has no layer {prefix} of this adapter; {there}")


def _check_blocks(component: str, model: nn.Module, name: str, weight: Mapping[str, Any]) -> None:
    """Refuse names of blocks that a UNet does not have, or that have no attention, which is all that is set there."""
    known = {
        part: [
            f"block_{k}" for k, block in enumerate(getattr(model, f"{part}_blocks")) if hasattr(block, "attentions")
        ]
        for part in ("down", "up")
    }
    for part, value in weight.items():
        if part not in (*known, "mid"):
            raise ValueError(f"adapter_weights: {name}: {component} has no blocks {part!r}; there are down, mid, up")
        for block in value if isinstance(value, Mapping) else ():
            if block not in known.get(part, ()):
                raise ValueError(
                    f"adapter_weights: {name}: {component} has no attention in {part}: {block!r}; those that have "
                    f"are {', '.join(known.get(part, ())) or 'not numbered, so give one number'}"
                )


def get_active_adapters(self: DiffusionPipeline) -> list[str]:
    """The names of the adapters that are active on any component, or as a control encoder, in their order."""
    if not records_of(self) and (method := stock(self, "get_active_adapters")):
        return method()
    active: dict[str, None] = {}
    for model in _adapted_models(self).values():
        for layer in tuner_layers(model):
            active |= dict.fromkeys(name for name in layer.active_adapters if name in layer._get_available_adapters())
    return list(active | dict.fromkeys(name for name, control in _controls(self).items() if control.active))


def get_list_adapters(self: DiffusionPipeline) -> dict[str, list[str]]:
    """The adapters of every component that has any, and those with a control encoder."""
    if not records_of(self) and (method := stock(self, "get_list_adapters")):
        return method()
    found = {component: list(model.peft_config) for component, model in _adapted_models(self).items()}
    controls = _controls(self)
    return found | ({CONTROL: list(controls)} if controls else {})


def delete_adapters(self: DiffusionPipeline, adapter_names: Sequence[str] | str) -> None:
    """Remove adapters from every component. What was merged of other adapters stays merged.

    Raises:
        ValueError: an unknown adapter, one that is fused, or modules that cannot be put back. Nothing is deleted then.
    """
    records = records_of(self)
    if not records and (method := stock(self, "delete_adapters")):
        return method(adapter_names)
    names, models = named(adapter_names, _known(self)), _adapted_models(self)
    check_removable(self, names)
    for component, model in models.items():
        merged = {name for layer in tuner_layers(model) for name in layer.merged_adapters}
        if fused := [name for name in names if name in merged]:
            raise ValueError(f"{', '.join(fused)} is fused on {component}: unfuse before deleting")
    detach(self, [name for name in names if name in records])
    for model in models.values():
        for name in names:
            if name in getattr(model, "peft_config", {}):
                delete_adapter_layers(model, name)
                getattr(model, "peft_config", {}).pop(name, None)  # transformers' models have lost it by now
        _unwrap_empty(model)
    return None


def _unwrap_empty(model: nn.Module) -> None:
    """Put back what lies below PEFT's layers of other methods that hold no adapter any more."""
    for path, layer in list(model.named_modules())[::-1]:  # the innermost first
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, EtherLayer):
            if not layer._get_available_adapters():
                model.set_submodule(path, layer.base_layer)


def _set_enabled(pipe: DiffusionPipeline, enabled: bool) -> None:
    if not records_of(pipe):
        raise ValueError(f"this {type(pipe).__name__} holds no ETHER adapter")
    for model in models_of(pipe).values():
        for _, layer in ether_layers(model):
            layer._disable_adapters = not enabled  # PEFT's own call would also make vectors trainable
    for control in _controls(pipe).values():
        control.enabled = enabled


def disable_ether(self: DiffusionPipeline) -> None:
    """Switch off every ETHER adapter, until `enable_ether`; adapters of other methods stay on.

    Raises:
        ValueError: no ETHER adapter is loaded.
    """
    _set_enabled(self, False)


def enable_ether(self: DiffusionPipeline) -> None:
    """Switch the active ETHER adapters on again after `disable_ether`.

    Raises:
        ValueError: no ETHER adapter is loaded.
    """
    _set_enabled(self, True)


def set_ether_device(
    self: DiffusionPipeline, adapter_names: Sequence[str] | str, device: torch.device | str | int
) -> None:
    """Move adapters' vectors and control encoders to a device, to make room on another.

    An adapter in use belongs where its layers are.

    Raises:
        ValueError: an adapter that is not loaded, or is no ETHER adapter.
    """
    records = records_of(self)
    for name in named(adapter_names, records):
        for component in records[name].configs:
            for _, layer in ether_layers(models_of(self)[component]):
                layer._move_adapter_to_device_of_base_layer(name, torch.device(device))
        if records[name].control is not None:
            records[name].control.encoder.to(device)
