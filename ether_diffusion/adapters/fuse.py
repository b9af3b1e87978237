"""Adapters written into the weights and out of them again, and what keeps that right beside other methods' adapters.

Adapters on one layer form a stack: the first that was loaded lies at the bottom, next to the weight, and each reflects
or adds to what the ones below it make. The order of loading is the order of composition: a LoRA loaded before ETHER is
reflected with the weight, `(W + BA)H`; one loaded after it is added, `WH + BA`. Only the bottom of a stack can be
merged into the weight; every call here keeps to that, or raises before anything changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.attach import adapters_of, ether_layers, forget, models_of, without_base_layer
from ether_diffusion.adapters.schema import canonical_path
from ether_diffusion.adapters.strength import carries_ether, stock
from ether_diffusion.tuner.layer import EtherLayer

KEEP_ORIGINAL = ("device", "cpu", "disk")


def fuse_ether(
    self: DiffusionPipeline,
    components: Sequence[str] | None = None,
    ether_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | None = None,
    *,
    keep_original: str = "device",
) -> None:
    """Write adapters into the weights, so that a step costs what it costs without them.

    `unfuse_ether` brings the weights back bit for bit, from what is kept until then.

    Args:
        components: default: all that carry ETHER.
        ether_scale: multiplies the adapters' strengths.
        safe_fusing: check every weight for NaN and infinity; if one fails, all are as they were before the call.
        adapter_names: default: the active ones.
        keep_original: where the fused layers' own weights wait: "device" (beside the model: one more copy of them),
            "cpu" (as much, in main memory), or "disk" (nothing: read again from the folder the model was loaded from,
            which must stay; each is compared with its file before it is changed).

    Raises:
        ValueError: nothing to fuse, an unknown component or adapter, an unmerged adapter of another method below, a
            broken weight, or weights that are not those on disk.
    """
    if keep_original not in KEEP_ORIGINAL:
        raise ValueError(f"keep_original={keep_original!r}: there are {', '.join(KEEP_ORIGINAL)}")
    if adapter_names and (unknown := sorted(set(adapter_names) - set(known := adapters_of(self)))):
        raise ValueError(f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(known) or 'none'}")
    chosen = [
        (layer, names, place)
        for layer, place in _chosen_layers(self, components)
        if (names := [n for n in adapter_names or layer.active_adapters if n in layer.ether_u])
    ]
    if not chosen:
        raise ValueError(f"nothing to fuse: no layer of {components} carries {adapter_names or 'an active adapter'}")
    for layer, _, (component, path, _) in chosen:
        _refuse_unless_lowest(layer, f"{component}: {path}")
    _refuse_merged_above((layer, place) for layer, _, place in chosen)
    index = {id(model): _files_of(model) for _, _, (_, _, model) in chosen} if keep_original == "disk" else {}
    on_disk = [_on_disk(layer, place, index[id(place[2])]) if index else None for layer, _, place in chosen]
    touched: list[tuple[EtherLayer, dict[str, float]]] = []
    try:
        for (layer, names, _), file in zip(chosen, on_disk, strict=True):
            earlier = {name: layer.merged_adaptations[name].strength for name in layer.merged_adapters}
            _merge_at(layer, {name: ether_scale * layer.scaling[name] for name in names}, safe_fusing)
            touched.append((layer, earlier))
            if keep_original != "device":
                layer._unmerged_weight = file or layer._pristine_weight().cpu()
    except BaseException:
        for layer, earlier in touched:
            layer.unmerge()
            if earlier:
                _merge_at(layer, earlier)
        raise


def _merge_at(layer: EtherLayer, strengths: Mapping[str, float], safe: bool = False) -> None:
    """Merge adapters at the given strengths, whatever the layer's own are."""
    now = dict(layer.scaling)
    layer.scaling |= strengths
    try:
        layer.merge(safe_merge=safe, adapter_names=list(strengths))
    finally:
        layer.scaling |= now


def unfuse_ether(self: DiffusionPipeline, components: Sequence[str] | None = None) -> None:
    """Undo `fuse_ether`: the weights are bit for bit what they were.

    Raises:
        ValueError: nothing to unfuse, an unknown component, an adapter of another method merged above (unfuse it
            first), or a file on disk that has changed since. Nothing has changed then.
    """
    chosen = [(layer, place) for layer, place in _chosen_layers(self, components) if layer.merged]
    _refuse_merged_above(chosen)
    for layer, _ in chosen:
        layer._pristine_weight()  # raises where it cannot be had any more
    for layer, _ in chosen:
        layer.unmerge()


Place = tuple[str, str, nn.Module]  # of a layer: component, module path, the component itself


def _chosen_layers(pipe: DiffusionPipeline, components: Sequence[str] | None) -> Iterator[tuple[EtherLayer, Place]]:
    carrying: dict[str, nn.Module] = {
        name: model for name, model in models_of(pipe).items() if any(True for _ in ether_layers(model))
    }
    chosen = list(carrying) if components is None else components
    if not carrying or set(chosen) - set(carrying):
        asked = f"{', '.join(chosen)}: " if chosen else ""
        raise ValueError(f"{asked}components that carry ETHER are {', '.join(carrying) or 'none'}")
    for name in chosen:
        yield from ((layer, (name, path, carrying[name])) for path, layer in ether_layers(carrying[name]))


# Stacks of adapters -------------------------------------------------------------------------------------------


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


def _refuse_unless_lowest(layer: EtherLayer, where: str) -> None:
    below = layer.base_layer
    if isinstance(below, BaseTunerLayer) and not below.merged and below._get_available_adapters():
        raise ValueError(
            f"{where}: {_described(below)} lies below ETHER, because it was loaded before, and is not fused: fuse it "
            "first (fuse_lora)"
        )


def _refuse_merged_above(chosen: Iterable[tuple[EtherLayer, Place]]) -> None:
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
    components: list[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
    **kwargs,
) -> None:
    """Diffusers' `fuse_lora`, with what ETHER adds to it on a pipeline that carries both.

    Without `adapter_names` it fuses every active adapter, ETHER's too.

    Raises:
        ValueError: an adapter would be merged above one that is not, or below one that is, which is not what the
            unfused adapters compute; says what to fuse or unfuse first. Nothing has changed then.
    """
    options = kwargs if components is None else kwargs | {"components": components}
    for component, model in models_of(self).items() if carries_ether(self) else ():
        if components is None or component in components:
            for path, stack in stacks(model):
                _check_order(f"{component}: {path}", stack, adapter_names)
    stock(self, "fuse_lora")(lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names, **options)


def _check_order(where: str, stack: list[BaseTunerLayer], adapter_names: Sequence[str] | None) -> None:
    """Refuse a merge after which the merged layers would not be the bottom of the stack."""
    merging = [bool(set(adapter_names or layer.active_adapters) & _unmerged(layer)) for layer in stack]
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


def _unmerged(layer: BaseTunerLayer) -> set[str]:
    return set(layer._get_available_adapters()) - set(layer.merged_adapters)


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


def unload_lora_weights(self: DiffusionPipeline, *args, **kwargs) -> None:
    """Diffusers' `unload_lora_weights`; on a pipeline that carries ETHER too, ETHER stays as it is, fused or not.

    What is fused of a LoRA stays in the weights, as it does without ETHER.
    """
    if not carries_ether(self):
        return stock(self, "unload_lora_weights")(*args, **kwargs)
    for model in models_of(self).values():
        for path, module in reversed(list(model.named_modules())):  # inner ones first
            if isinstance(module, BaseTunerLayer) and not isinstance(module, EtherLayer):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        ours = {name for _, layer in ether_layers(model) for name in layer.ether_u}
        forget(model, set(getattr(model, "peft_config", {})) - ours)
    return None


# Originals on disk --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightOnDisk:
    """A weight that waits in the safetensors file it was loaded from. Calling it reads it again.

    Raises:
        ValueError: the file is gone, or holds other values than when the weight was fused.
    """

    file: Path
    key: str
    dtype: torch.dtype
    sha256: str

    def __call__(self) -> Tensor:
        try:
            weight = _read(self.file, self.key).to(self.dtype)
        except Exception as error:
            raise ValueError(f"{self.file}: {self.key}, needed to unfuse, cannot be read: {error}") from error
        if _digest(weight) != self.sha256:
            raise ValueError(
                f"{self.file}: {self.key} has changed since it was fused; put the old file back to unfuse"
            )
        return weight


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _files_of(model: nn.Module) -> dict[str, list[Path]]:
    """The safetensors files of the folder that a model was loaded from, by the keys in them."""
    folder, found = Path(str(getattr(model.config, "_name_or_path", "") or "")), {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (it is no dict)
                found.setdefault(key, []).append(file)
    return found


def _on_disk(layer: EtherLayer, place: Place, files: Mapping[str, list[Path]]) -> WeightOnDisk:
    """The file that holds a layer's weight, as it is now, bit for bit.

    Raises:
        ValueError: no such file.
    """
    component, path, _ = place
    name, weight = without_base_layer(path), layer._plain_weight()
    for key in dict.fromkeys(f"{each}.weight" for each in (name, canonical_path(component, name))):
        for file in files.get(key, ()):
            if torch.equal(_read(file, key).to(weight.dtype), weight.cpu()):
                return WeightOnDisk(file, key, weight.dtype, _digest(weight))
    raise ValueError(
        f"{component}: {name}: no .safetensors file of the folder that the model was loaded from holds this weight as "
        "it is now: pass keep_original='cpu'"
    )
