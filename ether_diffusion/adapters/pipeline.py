"""`pipe.*_ether_*`: the methods that every `DiffusionPipeline` gets; the work is done by the modules beside this one.

Loading goes straight down: locate, read, check (`fit`), attach, record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from torch import Tensor

from ether_diffusion.adapters import fuse, stacks, strength
from ether_diffusion.adapters.attach import add_control, attach, detach
from ether_diffusion.adapters.attach import hotswap as swap
from ether_diffusion.adapters.components import AdapterRecord, free_name, named, records_of
from ether_diffusion.adapters.fit import restrict
from ether_diffusion.adapters.locate import HubSource, find_adapter_file
from ether_diffusion.adapters.per_prompt import ether_adapters_per_prompt
from ether_diffusion.adapters.reading import from_state_dict, is_pickle_by_name
from ether_diffusion.adapters.schema import WEIGHTS_NAME, Document
from ether_diffusion.adapters.writing import collect, write_adapter_file
from ether_diffusion.errors import InputError

logger = logging.getLogger(__name__)


def load_ether_weights(
    self: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    components: Sequence[str] | str | None = None,
    hotswap: bool = False,
    low_cpu_mem_usage: bool = True,
    autocast_adapter_dtype: bool = True,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> None:
    """Load an ETHER adapter onto the pipeline and make it the active one.

    All or nothing: every key and shape is checked against the pipeline before anything changes.

    Args:
        pretrained_model_name_or_path_or_dict: an adapter file, a folder with one (ours or PEFT's), the id of a Hub
            repository, or a state dict of `<component>.<module path>.ether_*` tensors.
        adapter_name: default: "default_0", or the next number that is free.
        weight_name: name of the file in the folder or repository; the only .safetensors file of a folder needs none.
        components: load what the file holds for these alone, such as "text_encoder" on the pipeline that encodes and
            "unet" on the one that denoises. Default: all that it holds.
        hotswap: write over the vectors of `adapter_name` (or of the only adapter) in place: same layers, same blocks,
            its strength and whether it is active stay; a compiled model is not compiled again.
        low_cpu_mem_usage: taken as by `load_lora_weights`; nothing but the vectors is allocated in either case.
        autocast_adapter_dtype: as in PEFT: False keeps the vectors in the dtypes of the layers instead of float32;
            with hotswap they stay in theirs.
        use_safetensors: taken as by `load_lora_weights`, but for False: pickles are never read.
        hub: subfolder, revision, token, cache_dir, local_files_only, force_download, as for `from_pretrained`.

    Raises:
        FileNotFoundError, OSError: nothing there, or the Hub is out of reach.
        ValueError: a damaged file, another format, a name that is taken or cannot be one, components of which the
            file holds nothing, or an adapter that does not fit this pipeline (names the module).
    """
    if unknown := sorted(set(hub) - {each.name for each in fields(HubSource)}):
        raise TypeError(f"load_ether_weights takes no argument {', '.join(unknown)}")
    source = pretrained_model_name_or_path_or_dict
    if not isinstance(source, str | PathLike | Mapping):
        raise InputError(
            f"load_ether_weights: got a {type(source).__name__}, needs one file, folder, Hub id or state dict: call "
            "it once for each adapter"
        )
    if use_safetensors is not None and not use_safetensors:
        raise InputError("use_safetensors=False: adapters are read from .safetensors files alone, never from pickles")
    if isinstance(source, Mapping):
        file = from_state_dict(source)
    else:
        file = find_adapter_file(source, weight_name=weight_name, hub=HubSource(**hub))
    if components is not None:
        file = restrict(self, file, components)
    if hotswap:
        record = swap(self, file, _which(self, None).name if adapter_name is None else adapter_name)
    else:
        name = free_name(self) if adapter_name is None else adapter_name
        record = attach(self, file, name, autocast=autocast_adapter_dtype)
    if record.other_base:
        logger.warning(
            "%s was trained on other base weights than those of %s here (its base model: %s); results will differ",
            file.source,
            ", ".join(record.other_base),
            file.metadata.get("base_model") or "unknown",
        )


def _which(pipe: DiffusionPipeline, adapter_name: str | None) -> AdapterRecord:
    """The adapter of this name, or without a name the only one.

    Raises:
        ValueError: there is none, or there are several.
    """
    records = records_of(pipe)
    if not records:
        raise ValueError(f"this {type(pipe).__name__} holds no ETHER adapter")
    if adapter_name is None:
        if len(records) > 1:
            raise ValueError(f"several adapters are loaded: pass adapter_name, one of {', '.join(records)}")
        return next(iter(records.values()))
    (name,) = named(adapter_name, records)
    return records[name]


def ether_state_dict(self: DiffusionPipeline, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Copies of an adapter's vectors, `<component>.<module path>.ether_*` -> (n, d/n), as a file holds them.

    Raises:
        ValueError: no adapter, or several and no name.
    """
    tensors = collect(self, _which(self, adapter_name).name).tensors
    return {f"{component}.{key}": tensor for component, vectors in tensors.items() for key, tensor in vectors.items()}


def save_ether_weights(
    self: DiffusionPipeline,
    save_directory: str | Path,
    adapter_name: str | None = None,
    *,
    weight_name: str = WEIGHTS_NAME,
    metadata: Mapping[str, str] | None = None,
    replaced_modules: Mapping[str, Sequence[str]] | None = None,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> Path:
    """Write an adapter to `save_directory / weight_name`, complete or not at all, and return that path.

    Args:
        save_directory: created if need be.
        adapter_name: needed where several adapters are loaded.
        weight_name: a .safetensors file name.
        metadata: more to record, e.g. {"prompt": "a photo of sks dog"}.
        replaced_modules: modules that were trained as they are, which the file then holds too, as component -> module
            paths: {"controlnet": ["controlnet_cond_embedding", "controlnet_mid_block"]}. What the adapter was loaded
            with is held in any case.
        is_main_process: where False, nothing is written or uploaded.
        safe_serialization: taken as by `save_lora_weights`, but for False: pickles are never written.
        push_to_hub: upload the whole folder (a model card that lies there too) to the Hub when it is written.
        repo_id: where to; default: the folder's name, under the user's own.
        commit_message, private, token, create_pr: as for diffusers' `push_to_hub`.

    Raises:
        ValueError: no adapter, several and no name, a config or a module that a pipeline file cannot hold, metadata
            under a name that the file itself uses, or `safe_serialization=False`.
    """
    if Path(weight_name).name != weight_name or Path(weight_name).suffix != ".safetensors":
        kind = "a pickle" if is_pickle_by_name(weight_name) else "not the name of a .safetensors file"
        raise ValueError(f"weight_name={weight_name!r} is {kind}; e.g. {WEIGHTS_NAME}")
    if not safe_serialization:
        raise InputError(
            "safe_serialization=False: adapters are written as .safetensors files alone, never as pickles"
        )
    if reserved := sorted(set(metadata or ()) & set(Document.model_fields)):
        raise ValueError(f"metadata: the file itself says what {', '.join(reserved)} is; choose another name")
    if replaced_modules and not records_of(self):  # there are no vectors, so nothing has a name yet
        name = adapter_name or free_name(self)
    else:
        name = _which(self, adapter_name).name
    adapter = collect(self, name, replaced_modules)
    adapter.metadata |= dict(metadata or {})
    path = Path(save_directory) / weight_name
    if not is_main_process:
        return path
    write_adapter_file(path, adapter)
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
    detach(self, records_of(self))


METHODS = (
    load_ether_weights,
    save_ether_weights,
    ether_state_dict,
    unload_ether_weights,
    fuse.fuse_ether,
    fuse.unfuse_ether,
    strength.set_adapters,
    strength.get_active_adapters,
    strength.get_list_adapters,
    strength.delete_adapters,
    strength.enable_ether,
    strength.disable_ether,
    strength.set_ether_device,
    stacks.save_pretrained,
    ether_adapters_per_prompt,
)
GUARDS = (
    stacks.load_lora_weights,
    stacks.fuse_lora,
    stacks.unfuse_lora,
    stacks.unload_lora_weights,
    stacks.fuse_qkv_projections,
)


class _OnSome:
    """A method that only some pipelines have: others behave as if there were none."""

    def __init__(self, function: Callable, has: Callable[[type], bool], why_not: str):
        self.function, self.has, self.why_not = function, has, why_not

    def __get__(self, pipe: DiffusionPipeline | None, kind: type) -> Callable:
        if not self.has(kind):
            raise AttributeError(f"{kind.__name__} has no {self.function.__name__}: {self.why_not}")
        return self.function if pipe is None else MethodType(self.function, pipe)


def _has_stock(name: str) -> Callable[[type], bool]:
    return lambda kind: any(name in base.__dict__ for base in kind.__mro__ if base is not DiffusionPipeline)


def install() -> None:
    """Give every DiffusionPipeline the methods above, and `ether_adapters`: the records of its adapters by name."""
    for method in METHODS:
        setattr(DiffusionPipeline, method.__name__, method)
    for method in GUARDS:
        guard = _OnSome(method, _has_stock(method.__name__), "diffusers loads no LoRA onto it")
        setattr(DiffusionPipeline, method.__name__, guard)
    applies = _OnSome(add_control, lambda kind: hasattr(kind, "check_control"), "it applies no control encoders")
    DiffusionPipeline.add_control = applies
    DiffusionPipeline.ether_adapters = property(records_of)
