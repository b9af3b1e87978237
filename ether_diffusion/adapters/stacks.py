"""Adapters of several methods on one layer, and what keeps stock LoRA calls right where ETHER is one of them.

They form a stack: the first that was loaded lies at the bottom, next to the weight, and each reflects or adds to what
the ones below it make. The order of loading is the order of composition: a LoRA loaded before ETHER is reflected with
the weight, `(W + BA)H`; one loaded after it is added, `WH + BA`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.attach import forget
from ether_diffusion.adapters.components import (
    as_names,
    check_removable,
    ether_layers,
    models_of,
    named,
    peft_adapters,
    records_of,
    tuner_layers,
)
from ether_diffusion.adapters.plugin import stock_attribute
from ether_diffusion.adapters.strength import stock
from ether_diffusion.control.pipelines import is_number
from ether_diffusion.tuner.guards import check_projections
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.merging import check_unmergeable
from ether_diffusion.tuner.undo import restored_on_error

stock_save_pretrained = stock_attribute(DiffusionPipeline, "save_pretrained")

Place = tuple[str, str, nn.Module]
"""Where a layer is: component, module path, the component itself."""


def stacks(model: nn.Module) -> Iterator[tuple[str, list[BaseTunerLayer]]]:
    """For every adapted layer, its path and the layers of its adapters, the lowest (next to the weight) first."""
    inner: set[int] = set()
    for path, module in model.named_modules():  # outer ones come before what they wrap
        if isinstance(module, BaseTunerLayer) and id(module) not in inner:
            stack = []
            while isinstance(module, BaseTunerLayer):
                stack.append(module)
                inner.add(id(module))
                module = module.base_layer
            yield path, stack[::-1]


def refuse_unless_lowest(layer: EtherLayer, where: str) -> None:
    below = layer.base_layer
    if isinstance(below, BaseTunerLayer) and not below.merged and below._get_available_adapters():
        raise ValueError(
            f"{where}: {_described(below)} lies below ETHER, because it was loaded before, and is not fused: fuse it "
            "first (fuse_lora)"
        )


def refuse_merged_above(chosen: Iterable[tuple[EtherLayer, Place]]) -> None:
    """Refuse to change a weight that an adapter above has merged itself into."""
    places = list(chosen)
    above = {
        id(layer): stack[k + 1 :]
        for model in {id(place[2]): place[2] for _, place in places}.values()
        for _, stack in stacks(model)
        for k, layer in enumerate(stack)
    }
    for layer, (component, path, _) in places:
        if merged := next((other for other in above[id(layer)] if other.merged), None):
            raise ValueError(
                f"{component}: {path}: {_described(merged)} lies above ETHER and is fused: call unfuse_lora first"
            )


def fuse_lora(
    self: DiffusionPipeline,
    components: Sequence[str] | str | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | str | None = None,
    **kwargs,
) -> None:
    """Diffusers' `fuse_lora`, with what ETHER adds to it on a pipeline that carries both.

    Without `adapter_names` it fuses every active adapter, ETHER's too.

    Raises:
        ValueError: an unknown component or adapter, a scale that is no finite number, a weight that cannot be merged,
            or an adapter that would be merged above one that is not, or below one that is, which is not what the
            unfused adapters compute; says what to fuse or unfuse first. Nothing has changed then.
    """
    adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    options = {"lora_scale": lora_scale, "safe_fusing": safe_fusing, "adapter_names": adapter_names} | kwargs
    if not records_of(self):
        options |= {} if components is None else {"components": components}
        return stock(self, "fuse_lora")(**options)
    if not is_number(lora_scale):
        raise ValueError(f"lora_scale={lora_scale!r}: a finite number fits")
    if adapter_names is not None:
        adapter_names = options["adapter_names"] = named(adapter_names, peft_adapters(self))
    components, chosen = _loadable(self, "fuse_lora", components)
    merging = []
    for component, model in chosen.items():
        for path, stack in stacks(model):
            _check_order(f"{component}: {path}", stack, adapter_names)
            merging += [la for la in stack if _merging(la, adapter_names) and not isinstance(la, EtherLayer)]
    # Most methods add to a weight in place; ETHER writes another tensor and keeps the old one itself.
    weights = [p for layer in merging for p in layer.get_base_layer().parameters(recurse=False)]
    with restored_on_error(chosen.values(), weights):
        for model in chosen.values():
            _merge_from_below(model, lora_scale, safe_fusing, adapter_names)
        stock(self, "fuse_lora")(components=components, **options)
    return None


def unfuse_lora(self: DiffusionPipeline, components: Sequence[str] | str | None = None, **kwargs) -> None:
    """Diffusers' `unfuse_lora`; every component is checked before the first one changes.

    Raises:
        ValueError: an unknown component, or a fused layer whose own weight cannot be put back (offloaded since, or
            the file with it has changed). Nothing has changed then.
    """
    if not records_of(self):
        return stock(self, "unfuse_lora")(**kwargs | ({} if components is None else {"components": components}))
    components, chosen = _loadable(self, "unfuse_lora", components)
    for model in chosen.values():
        for layer in tuner_layers(model):
            if layer.merged:
                check_unmergeable(layer)
    return stock(self, "unfuse_lora")(components=components, **kwargs)


def _loadable(
    pipe: DiffusionPipeline, call: str, components: Sequence[str] | str | None
) -> tuple[list[str], dict[str, nn.Module]]:
    """The components that a stock call goes over, by default those of its own signature, and the models they are.

    Raises:
        ValueError: one onto which diffusers loads no LoRA.
    """
    if components is None:
        components = inspect.signature(stock(pipe, call)).parameters["components"].default
    components = as_names("components", [] if components is None else components)
    if unknown := [name for name in components if name not in pipe._lora_loadable_modules]:
        raise ValueError(
            f"{call}: {', '.join(map(str, unknown))} is no component that a LoRA can be on here; those are "
            f"{', '.join(pipe._lora_loadable_modules)}"
        )
    models = models_of(pipe)
    return components, {name: models[name] for name in components if name in models}


def _merge_from_below(model: nn.Module, scale: float, safe: bool, adapter_names: Sequence[str] | None) -> None:
    """Merge stacks of several adapters, so that diffusers finds them merged.

    Of a text encoder it would merge the layers from the outside in, and what lies above ETHER would be reflected.
    """
    for _, stack in stacks(model):
        for layer in stack if len(stack) > 1 else ():
            if names := _merging(layer, adapter_names):
                layer.scale_layer(scale)
                layer.merge(safe_merge=safe, adapter_names=names)
                layer.unscale_layer(scale)  # diffusers scales it again


def _check_order(where: str, stack: list[BaseTunerLayer], adapter_names: Sequence[str] | None) -> None:
    """Refuse a merge after which the merged layers would not be the bottom of the stack."""
    merging = [bool(_merging(layer, adapter_names)) for layer in stack]
    for k, layer in enumerate(stack):
        if not merging[k]:
            continue
        for j, below in enumerate(stack[:k]):
            if not below.merged and not merging[j] and below._get_available_adapters():
                raise ValueError(
                    f"{where}: {_described(layer)} lies above {_described(below)}, which is not fused: fuse that "
                    "first (fuse_ether, or fuse_lora without adapter_names), or load it last"
                )
        if above := next((above for above in stack[k + 1 :] if above.merged), None):
            raise ValueError(f"{where}: {_described(layer)} lies below {_described(above)}, which is fused: unfuse it")


def _merging(layer: BaseTunerLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """Those of the named adapters, else of the active ones, that are on a layer and not merged yet."""
    unmerged = set(layer._get_available_adapters()) - set(layer.merged_adapters)
    return [name for name in adapter_names or layer.active_adapters if name in unmerged]


def _described(layer: BaseTunerLayer) -> str:
    kind = "ETHER" if isinstance(layer, EtherLayer) else type(layer).__module__.split(".")[-2].upper()
    return f"{kind} ({', '.join(sorted(layer._get_available_adapters()))})"


def load_lora_weights(self: DiffusionPipeline, *args, **kwargs) -> None:
    """Diffusers' `load_lora_weights`; PEFT unmerges the LoRAs that there are, which must not lie below fused ETHER.

    Raises:
        ValueError: an ETHER adapter is fused.
    """
    for component, model in models_of(self).items():
        if any(layer.merged for _, layer in ether_layers(model)):
            raise ValueError(f"{component} has a fused ETHER adapter: call unfuse_ether before loading a LoRA")
    stock(self, "load_lora_weights")(*args, **kwargs)


def fuse_qkv_projections(self: DiffusionPipeline, *args, **kwargs) -> None:
    """Diffusers' `fuse_qkv_projections`; every model that it goes over is checked before the first one changes.

    Raises:
        ValueError: a projection of a model that is to be fused carries ETHER, which would be lost.
    """
    method = stock(self, "fuse_qkv_projections")
    given = inspect.signature(method).bind(*args, **kwargs)
    given.apply_defaults()
    for component, model in models_of(self).items():
        if given.arguments.get(component):
            check_projections(model)
    method(*args, **kwargs)


def save_pretrained(self: DiffusionPipeline, *args, **kwargs) -> None:
    """Diffusers' `save_pretrained`; of layers with adapters it would write a folder that does not open.

    Raises:
        ValueError: an ETHER adapter is on the pipeline.
    """
    if names := [name for name, record in records_of(self).items() if record.configs or record.replaced]:
        raise ValueError(
            f"save_pretrained: {', '.join(names)} cannot be written into a pipeline's folder: save_ether_weights "
            "writes the adapter alone, ether_diffusion.export.merge_adapters a pipeline with it merged"
        )
    return stock_save_pretrained(self, *args, **kwargs)


def unload_lora_weights(self: DiffusionPipeline, *args, **kwargs) -> None:
    """Diffusers' `unload_lora_weights`; on a pipeline that carries ETHER too, ETHER stays as it is, fused or not.

    What is fused of a LoRA stays in the weights, as it does without ETHER.

    Raises:
        ValueError: the own adapter of a component that is a `PeftModel`.
    """
    if not records_of(self):
        return stock(self, "unload_lora_weights")(*args, **kwargs)
    check_removable(self, set(peft_adapters(self)) - set(records_of(self)))
    for model in models_of(self).values():
        for path, module in reversed(list(model.named_modules())):  # inner ones first
            if isinstance(module, BaseTunerLayer) and not isinstance(module, EtherLayer):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        ours = {name for _, layer in ether_layers(model) for name in layer.ether_u}
        forget(model, set(getattr(model, "peft_config", {})) - ours)
    return None
