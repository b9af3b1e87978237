"""Which adapters act, and how strongly: the pipeline's methods for it, over every component that carries one.

Diffusers has most of these on its LoRA mixins, for the components that LoRA files know. A pipeline that carries no
ETHER is left to them. With ETHER on it, ours answer for all adapters of all components: ControlNets too, pipelines
without a LoRA mixin, and LoRA beside ETHER.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.utils.peft_utils import delete_adapter_layers, set_weights_and_activate_adapters
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.attach import adapters_of, detach, ether_layers, models_of
from ether_diffusion.tuner.config import EtherConfig

Weight = float | Mapping[str, Any] | None


def stock(pipe: DiffusionPipeline, method: str) -> Callable | None:
    """The method that the pipeline has of diffusers' mixins, where it has one."""
    order = type(pipe).__mro__
    for kind in order[order.index(DiffusionPipeline) + 1 :]:
        if method in kind.__dict__:
            return getattr(kind, method).__get__(pipe)
    return None


def carries_ether(pipe: DiffusionPipeline) -> bool:
    return any(True for model in models_of(pipe).values() for _ in ether_layers(model))


def _adapted_models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: model for name, model in models_of(pipe).items() if getattr(model, "peft_config", None)}


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _known(pipe: DiffusionPipeline, adapter_names: Sequence[str] | str) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: a name that no component has, with those that there are.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    present = dict.fromkeys(name for model in _adapted_models(pipe).values() for name in model.peft_config)
    if unknown := [name for name in names if name not in present]:
        raise ValueError(f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(present) or 'none'}")
    return names


def set_adapters(
    self: DiffusionPipeline,
    adapter_names: Sequence[str] | str,
    adapter_weights: Weight | list[Weight] = None,
) -> None:
    """Make adapters the active ones, with their strengths; all others rest.

    Args:
        adapter_names: one name, or several in the order in which they act.
        adapter_weights: a strength for all, or a list of one for each. A strength is a number; or numbers by
            component, `{"unet": 0.8, "text_encoder": 0.5}`; and a UNet's may be by block,
            `{"unet": {"down": 0.8, "mid": 1.0, "up": {"block_0": 0.6}}}`. Default: 1.

    Raises:
        ValueError: an unknown adapter or component, or lists of different lengths.
    """
    if not carries_ether(self) and (method := stock(self, "set_adapters")):
        return method(adapter_names, adapter_weights)
    names, models = _known(self, adapter_names), _adapted_models(self)
    weights = list(adapter_weights) if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters ({', '.join(names)}), but {len(weights)} weights")
    for weight in weights:
        if isinstance(weight, Mapping) and (unknown := sorted(set(weight) - set(models))):
            raise ValueError(
                f"adapter_weights: {', '.join(unknown)} carries no adapter; the components that do are "
                f"{', '.join(models)}"
            )
    for component, model in models.items():
        own = [weight.get(component) if isinstance(weight, Mapping) else weight for weight in weights]
        own = [1.0 if weight is None else weight for weight in own]
        by_block = _SET_ADAPTER_SCALE_FN_MAPPING[type(model).__name__](model, own)
        set_weights_and_activate_adapters(model, names, by_block)


def get_active_adapters(self: DiffusionPipeline) -> list[str]:
    """The names of the adapters that are active on any component, in their order."""
    if not carries_ether(self) and (method := stock(self, "get_active_adapters")):
        return method()
    active: dict[str, None] = {}
    for model in _adapted_models(self).values():
        for layer in _tuner_layers(model):
            active |= dict.fromkeys(name for name in layer.active_adapters if name in layer._get_available_adapters())
    return list(active)


def get_list_adapters(self: DiffusionPipeline) -> dict[str, list[str]]:
    """The adapters of every component that has any."""
    if not carries_ether(self) and (method := stock(self, "get_list_adapters")):
        return method()
    return {component: list(model.peft_config) for component, model in _adapted_models(self).items()}


def delete_adapters(self: DiffusionPipeline, adapter_names: Sequence[str] | str) -> None:
    """Remove adapters from every component. What was merged of other adapters stays merged.

    Raises:
        ValueError: an unknown adapter, or one that is fused. Nothing is deleted then.
    """
    if not carries_ether(self) and (method := stock(self, "delete_adapters")):
        return method(adapter_names)
    names, models = _known(self, adapter_names), _adapted_models(self)
    for component, model in models.items():
        merged = {name for layer in _tuner_layers(model) for name in layer.merged_adapters}
        if fused := [name for name in names if name in merged]:
            raise ValueError(f"{', '.join(fused)} is fused on {component}: unfuse before deleting")
    for model in models.values():
        for name in (name for name in names if name in model.peft_config):
            if isinstance(model.peft_config[name], EtherConfig):
                detach(model, name)
            else:
                delete_adapter_layers(model, name)
                model.peft_config.pop(name, None)
    return None


def _set_enabled(pipe: DiffusionPipeline, enabled: bool) -> None:
    layers = [layer for model in models_of(pipe).values() for _, layer in ether_layers(model)]
    if not layers:
        raise ValueError(f"this {type(pipe).__name__} holds no ETHER adapter")
    for layer in layers:
        layer._disable_adapters = not enabled  # PEFT's own call would also make vectors trainable


def disable_ether(self: DiffusionPipeline) -> None:
    """Let every ETHER adapter rest, until `enable_ether`; adapters of other methods go on.

    Raises:
        ValueError: no ETHER adapter is loaded.
    """
    _set_enabled(self, False)


def enable_ether(self: DiffusionPipeline) -> None:
    """Let the active ETHER adapters act again after `disable_ether`.

    Raises:
        ValueError: no ETHER adapter is loaded.
    """
    _set_enabled(self, True)


def set_ether_device(
    self: DiffusionPipeline, adapter_names: Sequence[str] | str, device: torch.device | str | int
) -> None:
    """Move adapters' vectors to a device, to make room on another; an adapter in use belongs where its layers are.

    Raises:
        ValueError: an adapter that is not loaded, or is no ETHER adapter.
    """
    names, ours = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names), adapters_of(self)
    if unknown := [name for name in names if name not in ours]:
        raise ValueError(f"there is no ETHER adapter {', '.join(unknown)}; loaded are {', '.join(ours) or 'none'}")
    for model in models_of(self).values():
        for _, layer in ether_layers(model):
            for name in names:
                layer._move_adapter_to_device_of_base_layer(name, torch.device(device))
