"""`pipe.*_ether_*`: the methods that every `DiffusionPipeline` gets; the work is in `injection` and `sources`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .checkpoint import DOCUMENT_FIELDS, WEIGHTS_NAME, from_state_dict, is_pickle_by_name, write_checkpoint
from .injection import adapters_of, collect, ether_layers, free_name, models_of, other_base, put_on, take_off
from .layers import EtherLayer
from .sources import find_checkpoint

logger = logging.getLogger(__name__)


def load_ether_weights(
    self: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    low_cpu_mem_usage: bool = True,
) -> None:
    """Load an ETHER adapter onto the pipeline and make it the active one.

    All or nothing: every key and shape is checked against the pipeline before anything changes.

    Args:
        pretrained_model_name_or_path_or_dict: an adapter file, a folder with one (ours or PEFT's), the id of a Hub
            repository, or a state dict of `<component>.<module path>.ether_*` tensors.
        adapter_name: default: "default_0", or the next number that is free.
        weight_name: name of the file in the folder or repository.
        subfolder, revision, token, cache_dir, local_files_only, force_download: as for `from_pretrained`.
        low_cpu_mem_usage: False also allocates the vectors' starting values, which loading then replaces.

    Raises:
        FileNotFoundError, OSError: nothing there, or the Hub is out of reach.
        ValueError: a damaged file, another format, a name that is taken or cannot be one, or an adapter that does not
            fit this pipeline (names the module).
    """
    if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
        checkpoint = from_state_dict(pretrained_model_name_or_path_or_dict)
    else:
        checkpoint = find_checkpoint(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    name = free_name(self) if adapter_name is None else adapter_name
    put_on(self, checkpoint, name, low_cpu_mem_usage=low_cpu_mem_usage)
    if differing := other_base(self, name, checkpoint.metadata):
        logger.warning(
            "%s was trained on other base weights than those of %s here (its base model: %s); results will differ",
            checkpoint.source,
            ", ".join(differing),
            checkpoint.metadata.get("base_model") or "unknown",
        )


def _which(pipe: DiffusionPipeline, adapter_name: str | None) -> str:
    names = adapters_of(pipe)
    if not names:
        raise ValueError(f"this {type(pipe).__name__} holds no ETHER adapter")
    if adapter_name is None and len(names) == 1:
        return next(iter(names))
    if adapter_name not in names:
        asked = f"there is no adapter {adapter_name!r}" if adapter_name else "several adapters are loaded"
        raise ValueError(f"{asked}: pass adapter_name, one of {', '.join(names)}")
    return adapter_name


def ether_state_dict(self: DiffusionPipeline, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The vectors of an adapter, `<component>.<module path>.ether_*` -> (n, d/n), as a file holds them.

    Raises:
        ValueError: no adapter, or several and no name.
    """
    tensors = collect(self, _which(self, adapter_name)).tensors
    return {f"{component}.{key}": tensor for component, vectors in tensors.items() for key, tensor in vectors.items()}


def save_ether_weights(
    self: DiffusionPipeline,
    save_directory: str | Path,
    adapter_name: str | None = None,
    *,
    weight_name: str = WEIGHTS_NAME,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter to `save_directory / weight_name`, whole or not at all, and return that path.

    Args:
        save_directory: created if need be.
        adapter_name: needed where several adapters are loaded.
        weight_name: a .safetensors file name.
        metadata: more to record, e.g. {"prompt": "a photo of sks dog"}.

    Raises:
        ValueError: no adapter, several and no name, a config that a pipeline file cannot hold, or metadata under a
            name that the file itself uses.
    """
    if Path(weight_name).name != weight_name or Path(weight_name).suffix != ".safetensors":
        kind = "a pickle" if is_pickle_by_name(weight_name) else "not the name of a .safetensors file"
        raise ValueError(f"weight_name={weight_name!r} is {kind}; e.g. {WEIGHTS_NAME}")
    if reserved := sorted(set(metadata or ()) & set(DOCUMENT_FIELDS)):
        raise ValueError(f"metadata: the file itself says what {', '.join(reserved)} is; choose another name")
    checkpoint = collect(self, _which(self, adapter_name))
    checkpoint.metadata |= dict(metadata or {})
    path = Path(save_directory) / weight_name
    write_checkpoint(path, checkpoint)
    return path


def unload_ether_weights(self: DiffusionPipeline) -> None:
    """Remove every ETHER adapter, fused or not: modules, weights and attributes are as before the first load."""
    for model in models_of(self).values():
        if any(True for _ in ether_layers(model)):
            take_off(model)


def fuse_ether(
    self: DiffusionPipeline,
    components: list[str] | None = None,
    ether_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Write adapters into the weights, so that a step costs what it costs without them.

    Keeps a copy of every fused weight until `unfuse_ether`.

    Args:
        components: default: all that carry ETHER.
        ether_scale: multiplies the adapters' strengths.
        safe_fusing: check every weight for NaN and infinity; if one fails, all are as they were before the call.
        adapter_names: default: the active ones.

    Raises:
        ValueError: nothing to fuse, an unknown component or adapter, or a broken weight.
    """
    known = adapters_of(self)
    if unknown := sorted(set(adapter_names or ()) - set(known)):
        raise ValueError(f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(known) or 'none'}")
    chosen = [
        (layer, names)
        for layer in _chosen_layers(self, components)
        if (names := [n for n in adapter_names or layer.active_adapters if n in layer.ether_u])
    ]
    if not chosen:
        raise ValueError(f"nothing to fuse: no layer of {components} carries {adapter_names or 'an active adapter'}")
    touched: list[tuple[EtherLayer, dict[str, float]]] = []
    try:
        for layer, names in chosen:
            earlier = {name: layer._merged_arguments[name]["strength"] for name in layer.merged_adapters}
            _merge_at(layer, {name: ether_scale * layer.scaling[name] for name in names}, safe_fusing)
            touched.append((layer, earlier))
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


def unfuse_ether(self: DiffusionPipeline, components: list[str] | None = None) -> None:
    """Undo `fuse_ether`: the weights are bit for bit what they were.

    Raises:
        ValueError: nothing to unfuse, or an unknown component.
    """
    for layer in _chosen_layers(self, components):
        if layer.merged:
            layer.unmerge()


def _chosen_layers(pipe: DiffusionPipeline, components: list[str] | None) -> Iterator[EtherLayer]:
    carrying: dict[str, nn.Module] = {
        name: model for name, model in models_of(pipe).items() if any(True for _ in ether_layers(model))
    }
    chosen = list(carrying) if components is None else components
    if not carrying or set(chosen) - set(carrying):
        asked = f"{', '.join(chosen)}: " if chosen else ""
        raise ValueError(f"{asked}components that carry ETHER are {', '.join(carrying) or 'none'}")
    for name in chosen:
        yield from (layer for _, layer in ether_layers(carrying[name]))


METHODS = (
    load_ether_weights,
    save_ether_weights,
    ether_state_dict,
    unload_ether_weights,
    fuse_ether,
    unfuse_ether,
)


def install() -> None:
    """Give every DiffusionPipeline the methods above."""
    for method in METHODS:
        setattr(DiffusionPipeline, method.__name__, method)
