"""Write adapters into the weights and take them out again, bit for bit.

Adapters on one layer form a stack (see `stacks.py`): only the bottom of it can be merged into the weight. Every call
here keeps to that, or raises before anything changes. The weights as they were wait on the device, on the CPU, or in
the files that they were loaded from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.components import as_names, ether_layers, models_of, named, names_of, records_of
from ether_diffusion.adapters.schema import bytes_of, canonical_path, without_base_layer
from ether_diffusion.adapters.stacks import Place, refuse_merged_above, refuse_unless_lowest
from ether_diffusion.control.pipelines import is_number
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.merging import check_unmergeable

KEEP_ORIGINAL = ("device", "cpu", "disk")


@torch.inference_mode(False)
def fuse_ether(
    self: DiffusionPipeline,
    components: Sequence[str] | str | None = None,
    ether_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: Sequence[str] | str | None = None,
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
        ValueError: nothing to fuse, an unknown component or adapter, a scale that is no finite number, an unmerged
            adapter of another method below, a broken weight, or weights that are not those on disk.
    """
    if keep_original not in KEEP_ORIGINAL:
        raise ValueError(f"keep_original={keep_original!r}: there are {', '.join(KEEP_ORIGINAL)}")
    if not is_number(ether_scale):
        raise ValueError(f"ether_scale={ether_scale!r}: a finite number fits")
    adapter_names = named([] if adapter_names is None else adapter_names, records_of(self))
    chosen = [
        (layer, names, place)
        for layer, place in _chosen_layers(self, components)
        if (names := [n for n in adapter_names or layer.active_adapters if n in layer.ether_u])
    ]
    if not chosen:
        raise ValueError(f"nothing to fuse: no layer of {components} carries {adapter_names or 'an active adapter'}")
    for layer, _, (component, path, _) in chosen:
        refuse_unless_lowest(layer, f"{component}: {path}")
    refuse_merged_above((layer, place) for layer, _, place in chosen)
    index = {id(model): _files_of(model) for _, _, (_, _, model) in chosen} if keep_original == "disk" else {}
    on_disk = [_on_disk(layer, place, index[id(place[2])]) if index else None for layer, _, place in chosen]
    touched: list[tuple[EtherLayer, dict[str, float]]] = []
    try:
        for (layer, names, _), file in zip(chosen, on_disk, strict=True):
            earlier = {name: layer.merged_adaptations[name].strength for name in layer.merged_adapters}
            _merge_at(layer, {name: ether_scale * layer.scaling[name] for name in names}, safe_fusing)
            touched.append((layer, earlier))
            if keep_original != "device":
                layer.original_weight = file or layer.unmerged_weight().cpu()
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


@torch.inference_mode(False)
def unfuse_ether(self: DiffusionPipeline, components: Sequence[str] | str | None = None) -> None:
    """Undo `fuse_ether`: the weights are bit for bit what they were.

    Raises:
        ValueError: nothing to unfuse, an unknown component, an adapter of another method merged above (unfuse it
            first), or a file on disk that has changed since. Nothing has changed then.
    """
    chosen = [(layer, place) for layer, place in _chosen_layers(self, components) if layer.merged]
    refuse_merged_above(chosen)
    for layer, _ in chosen:
        check_unmergeable(layer)
    for layer, _ in chosen:
        layer.unmerge()


def _chosen_layers(
    pipe: DiffusionPipeline, components: Sequence[str] | str | None
) -> Iterator[tuple[EtherLayer, Place]]:
    carrying: dict[str, nn.Module] = {
        name: model for name, model in models_of(pipe).items() if any(True for _ in ether_layers(model))
    }
    names = names_of(pipe)
    asked_for = carrying if components is None else as_names("components", components)
    chosen = list(dict.fromkeys(names.get(name, name) for name in asked_for))
    if not carrying or set(chosen) - set(carrying):
        asked = f"{', '.join(chosen)}: " if chosen else ""
        raise ValueError(f"{asked}components that carry ETHER are {', '.join(carrying) or 'none'}")
    for name in chosen:
        yield from ((layer, (name, path, carrying[name])) for path, layer in ether_layers(carrying[name]))


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
    return hashlib.sha256(bytes_of(weight)).hexdigest()


def _files_of(model: nn.Module) -> dict[str, list[Path]]:
    """The safetensors files of the folder that a model was loaded from, by the keys in them.

    Models do not say of which `subfolder` they are, so those of a folder are looked through after itself.
    """
    name, found = getattr(model.config, "_name_or_path", None), {}
    folder = Path(str(name))
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*/*.safetensors"))]
    for file in files if name and folder.is_dir() else ():
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (it is no dict)
                found.setdefault(key, []).append(file)
    return found


def _on_disk(layer: EtherLayer, place: Place, files: Mapping[str, list[Path]]) -> WeightOnDisk:
    """The file that holds a layer's weight, as it is now, bit for bit.

    Raises:
        ValueError: no such file.
    """
    component, path, _ = place
    name, weight = without_base_layer(path), layer.plain_weight()
    for key in dict.fromkeys(f"{each}.weight" for each in (name, canonical_path(component, name))):
        for file in files.get(key, ()):
            if torch.equal(_read(file, key).to(weight.dtype), weight.cpu()):
                return WeightOnDisk(file, key, weight.dtype, _digest(weight))
    raise ValueError(
        f"{component}: {name}: no .safetensors file of the folder that the model was loaded from holds this weight as "
        "it is now: pass keep_original='cpu'"
    )
