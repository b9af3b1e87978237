"""`pipe.*_ether_*`: the methods that every `DiffusionPipeline` gets; the work is in `injection` and `sources`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from torch import Tensor

from ether_diffusion.adapters import fuse as fusing
from ether_diffusion.adapters import strength as switching
from ether_diffusion.adapters.attach import (
    adapters_of,
    attach,
    collect,
    detach,
    ether_layers,
    free_name,
    held_whole,
    models_of,
    other_base,
    swap,
)
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import (
    DOCUMENT_FIELDS,
    WEIGHTS_NAME,
    from_state_dict,
    is_pickle_by_name,
    write_adapter_file,
)

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
    hotswap: bool = False,
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
        hotswap: write over the vectors of `adapter_name` (or of the only adapter) in place: same layers, same blocks,
            its strength and whether it is active stay; a compiled model is not compiled again.
        low_cpu_mem_usage: False also allocates the vectors' starting values, which loading then replaces.

    Raises:
        FileNotFoundError, OSError: nothing there, or the Hub is out of reach.
        ValueError: a damaged file, another format, a name that is taken or cannot be one, or an adapter that does not
            fit this pipeline (names the module).
    """
    if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
        checkpoint = from_state_dict(pretrained_model_name_or_path_or_dict)
    else:
        checkpoint = find_adapter_file(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    if hotswap:
        name = _which(self, None) if adapter_name is None else adapter_name
        swap(self, checkpoint, name)
    else:
        name = free_name(self) if adapter_name is None else adapter_name
        attach(self, checkpoint, name, low_cpu_mem_usage=low_cpu_mem_usage)
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
    whole_modules: Mapping[str, Sequence[str]] | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> Path:
    """Write an adapter to `save_directory / weight_name`, whole or not at all, and return that path.

    Args:
        save_directory: created if need be.
        adapter_name: needed where several adapters are loaded.
        weight_name: a .safetensors file name.
        metadata: more to record, e.g. {"prompt": "a photo of sks dog"}.
        whole_modules: modules that were trained as they are, which the file then holds too, as component -> module
            paths: {"controlnet": ["controlnet_cond_embedding", "controlnet_mid_block"]}. What the adapter was loaded
            with is held in any case.
        push_to_hub: upload the whole folder (a model card that lies there too) to the Hub when it is written.
        repo_id: where to; default: the folder's name, under the user's own.
        commit_message, private, token, create_pr: as for diffusers' `push_to_hub`.

    Raises:
        ValueError: no adapter, several and no name, a config or a module that a pipeline file cannot hold, or metadata
            under a name that the file itself uses.
    """
    if Path(weight_name).name != weight_name or Path(weight_name).suffix != ".safetensors":
        kind = "a pickle" if is_pickle_by_name(weight_name) else "not the name of a .safetensors file"
        raise ValueError(f"weight_name={weight_name!r} is {kind}; e.g. {WEIGHTS_NAME}")
    if reserved := sorted(set(metadata or ()) & set(DOCUMENT_FIELDS)):
        raise ValueError(f"metadata: the file itself says what {', '.join(reserved)} is; choose another name")
    if whole_modules and adapter_name is None and not adapters_of(self):
        adapter_name = free_name(self)  # there are no vectors: nothing has a name
    name = adapter_name if whole_modules and not adapters_of(self) else _which(self, adapter_name)
    checkpoint = collect(self, name, whole_modules)
    checkpoint.metadata |= dict(metadata or {})
    path = Path(save_directory) / weight_name
    write_adapter_file(path, checkpoint)
    if push_to_hub:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id or path.parent.resolve().name, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=path.parent,
            commit_message=commit_message or "Upload ETHER adapter",
            create_pr=create_pr,
        )
    return path


def unload_ether_weights(self: DiffusionPipeline) -> None:
    """Remove every ETHER adapter, fused or not: modules, weights and attributes are as before the first load."""
    for model in models_of(self).values():
        if any(True for _ in ether_layers(model)) or held_whole(model):
            detach(model)


def delete_adapters(self: DiffusionPipeline, adapter_names: Sequence[str] | str) -> None:
    """Remove adapters from every component. What was merged of other adapters stays merged.

    Raises:
        ValueError: an unknown adapter, or one that is fused. Nothing is deleted then.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    models = models_of(self).values()
    carried = {name for model in models for name in getattr(model, "peft_config", {})}
    # Of an adapter without vectors PEFT knows nothing.
    whole = {held.adapter_name for model in models if (held := held_whole(model))} - carried
    others = [name for name in names if name not in whole]
    for model in models:
        if (held := held_whole(model)) and held.adapter_name in names:
            held.places(model)  # raises where they cannot be put back
    if others or not names:
        switching.delete_adapters(self, others)
    for model in models:
        if (held := held_whole(model)) and held.adapter_name in names:
            detach(model, held.adapter_name)


METHODS = (
    load_ether_weights,
    save_ether_weights,
    ether_state_dict,
    unload_ether_weights,
    fusing.fuse_ether,
    fusing.unfuse_ether,
    switching.set_adapters,
    switching.get_active_adapters,
    switching.get_list_adapters,
    delete_adapters,
    switching.enable_ether,
    switching.disable_ether,
    switching.set_ether_device,
)
GUARDS = (fusing.load_lora_weights, fusing.fuse_lora, fusing.unload_lora_weights)


class _Guard:
    """A method around one of diffusers' LoRA mixins, there only where a pipeline has that one."""

    def __init__(self, function: Callable):
        self.function = function

    def __get__(self, pipe: DiffusionPipeline | None, kind: type) -> Callable:
        if not any(self.function.__name__ in base.__dict__ for base in kind.__mro__ if base is not DiffusionPipeline):
            raise AttributeError(f"{kind.__name__} has no {self.function.__name__}: diffusers loads no LoRA onto it")
        return self.function if pipe is None else MethodType(self.function, pipe)


def install() -> None:
    """Give every DiffusionPipeline the methods above."""
    for method in METHODS:
        setattr(DiffusionPipeline, method.__name__, method)
    for method in GUARDS:
        setattr(DiffusionPipeline, method.__name__, _Guard(method))
