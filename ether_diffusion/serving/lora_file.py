"""LoRA files as adapters in main memory: whatever diffusers and PEFT read that is plain LoRA, without attaching it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, get_peft_kwargs
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.fit import find_module
from ether_diffusion.adapters.reading import (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    check_start,
    read_tensors,
)
from ether_diffusion.errors import EtherFileError
from ether_diffusion.serving.host_adapter import HostAdapter, Pair

DEFAULT_NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the LoraConfig of each component, as JSON, in a file's metadata."""
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def find_lora_file(source: str | Path) -> Path | None:
    """The LoRA file that this is or, a folder, holds; None where it is something else, or nothing.

    Raises:
        EtherFileError: a file that is no whole safetensors file.
    """
    path = Path(source)
    if path.is_dir():
        if (path / PEFT_CONFIG_NAME).is_file() and (path / PEFT_WEIGHTS_NAME).is_file():
            path = path / PEFT_WEIGHTS_NAME
        elif (path / DEFAULT_NAME).is_file():
            path = path / DEFAULT_NAME
        else:
            files = [file for file in path.glob("*.safetensors") if file.is_file()]
            path = files[0] if len(files) == 1 else path
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    check_start(path)
    try:
        with safe_open(path, "np") as file:
            names, metadata = file.keys(), file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise EtherFileError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error
    return path if "ether" not in metadata and any("lora" in name for name in names) else None


def read_lora(pipe: DiffusionPipeline, path: Path) -> HostAdapter:
    """The LoRA of a file, as `load_lora_weights` (or PEFT, of its own folders) would attach it to the pipeline.

    Raises:
        EtherFileError: more than plain LoRA on linear layers and convolutions, or what does not fit the pipeline.
    """
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    with safe_open(path, "np") as file:
        metadata = _json(path, (file.metadata() or {}).get(METADATA, "{}"))
    models = models_of(pipe)
    if path.name == PEFT_WEIGHTS_NAME and (path.parent / PEFT_CONFIG_NAME).is_file():
        component, state = _only_fitting(pipe, path, tensors), _of_peft(tensors)
        config = _config(path, _json(path.parent, (path.parent / PEFT_CONFIG_NAME).read_text()))
        return HostAdapter(str(path.parent), {component: _pairs(path, component, models[component], state, config)})
    parts, alphas = _diffusers_parts(pipe, path, tensors)
    factors = {}
    for component, own in parts.items():
        state = _as_peft(models[component], own)
        _check_plain(path, component, state)
        config = _config_of(path, component, models[component], state, alphas, metadata)
        factors[component] = _pairs(path, component, models[component], state, config)
    return HostAdapter(str(path), factors)


def _json(where: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EtherFileError(f"{where}: its LoRA config is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise EtherFileError(f"{where}: its LoRA config is a JSON {type(found).__name__}, not an object")
    return found


def _of_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def _only_fitting(pipe: DiffusionPipeline, path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The only component that has all the layers of a file that does not name it."""
    layers = {_layer(name) for name in _of_peft(tensors)}
    fitting = []
    for component, model in models_of(pipe).items():
        modules = dict(model.named_modules())
        if all(find_module(modules, layer) is not None for layer in layers):
            fitting.append(component)
    if len(fitting) != 1:
        what = f"fits several components ({', '.join(fitting)})" if fitting else "fits no component of this pipeline"
        raise EtherFileError(f"{path.parent} {what}")
    return fitting[0]


def _diffusers_parts(
    pipe: DiffusionPipeline, path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, float] | None]:
    """The tensors of each component in diffusers' names, and the alphas that stand beside them."""
    if not hasattr(pipe, "lora_state_dict"):
        raise EtherFileError(f"{path} is a LoRA, and diffusers loads none onto a {type(pipe).__name__}")
    if strange := [name for name in tensors if "dora_scale" in name or "lokr_" in name or "hada_" in name]:
        raise EtherFileError(f"{path}: {strange[0]} is of another method than plain LoRA, which rows cannot have")
    # SDXL's blocks are counted otherwise in files of other tools.
    options = {"unet_config": pipe.unet.config} if isinstance(pipe, StableDiffusionXLLoraLoaderMixin) else {}
    try:
        found = pipe.lora_state_dict(tensors, return_lora_metadata=True, return_alphas=True, **options)
    except (KeyError, ValueError, RuntimeError) as error:
        raise EtherFileError(f"{path} is a LoRA that diffusers does not read: {error}") from error
    alphas = found[1] if len(found) == 3 else None
    models, parts = models_of(pipe), {}
    for name, tensor in found[0].items():
        component, _, key = name.partition(".")
        if component not in models:
            raise EtherFileError(f"{path}: {name} is for no component of this {type(pipe).__name__}")
        parts.setdefault(component, {})[key] = tensor
    return parts, alphas


def _as_peft(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """In PEFT's names, as diffusers converts them."""
    if isinstance(model, PreTrainedModel):
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
    return state if "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)


def _config_of(
    path: Path,
    component: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float] | None,
    metadata: Mapping[str, Any],
) -> LoraConfig:
    own = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
    if own:
        return _config(path, own)
    is_denoiser = not isinstance(model, PreTrainedModel)
    mark = "^" if is_denoiser else ""
    ranks = {f"{mark}{name}": tensor.shape[1] for name, tensor in state.items() if "lora_B" in name}
    if alphas:
        alphas = {k.removeprefix(f"{component}."): v for k, v in alphas.items() if k.startswith(f"{component}.")}
    return _config(path, get_peft_kwargs(ranks, alphas or None, state, is_unet=is_denoiser))


def _config(path: Path, values: Mapping[str, Any]) -> LoraConfig:
    try:
        config = LoraConfig.from_peft_type(**{"peft_type": "LORA"} | dict(values))
    except (TypeError, ValueError) as error:
        raise EtherFileError(f"{path}: its LoRA config is not valid: {error}") from error
    if not isinstance(config, LoraConfig):
        raise EtherFileError(f"{path} is of {config.peft_type}, not plain LoRA, which is all that rows can have")
    if config.use_dora or config.lora_bias or config.bias != "none" or config.modules_to_save:
        raise EtherFileError(
            f"{path} holds more than plain LoRA (DoRA, biases or whole modules), which rows cannot have"
        )
    return config


def _check_plain(path: Path, component: str, state: Mapping[str, Tensor]) -> None:
    if strange := [name for name in state if not name.endswith(SUFFIXES)]:
        raise EtherFileError(
            f"{path}: {component}.{strange[0]} is no factor of a plain LoRA, which is all rows can have"
        )


def _layer(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _pairs(
    path: Path, component: str, model: nn.Module, state: Mapping[str, Tensor], config: LoraConfig
) -> dict[str, Pair]:
    """(A, B) of each layer, by its path in the model; B times the scaling that PEFT gives the layer."""
    _check_plain(path, component, state)
    modules = dict(model.named_modules())
    pairs = {}
    for layer in dict.fromkeys(map(_layer, state)):
        where = f"{path}: {component}.{layer}"
        name = find_module(modules, layer)
        if name is None:
            raise EtherFileError(f"{where} does not exist in this {type(model).__name__}")
        down, up = (state.get(f"{layer}{suffix}") for suffix in SUFFIXES)
        if down is None or up is None:
            raise EtherFileError(f"{where} has one factor of two")
        _check_factors(where, modules[name], down, up)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        if rank != len(down):
            raise EtherFileError(f"{where} has rank {len(down)}, but its config says {rank}")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        pairs[name] = (
            down.float().flatten(1).T.contiguous(),
            (scaling * up.float().flatten(1)).T.contiguous(),
        )
    return pairs


def _check_factors(where: str, layer: nn.Module, down: Tensor, up: Tensor) -> None:
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise EtherFileError(
                f"{where} is a grouped convolution here (groups={layer.groups}), which rows cannot adapt"
            )
        inputs, outputs = (layer.in_channels, *layer.kernel_size), (layer.out_channels, len(down), 1, 1)
    elif hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        inputs, outputs = (layer.in_features,), (layer.out_features, len(down))
    else:
        raise EtherFileError(f"{where} is a {type(layer).__name__} here, not a Linear or Conv2d to adapt")
    if tuple(down.shape[1:]) != inputs or tuple(up.shape) != outputs:
        raise EtherFileError(
            f"{where} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}, but the layer here needs "
            f"(r, {', '.join(map(str, inputs))}) and {outputs}"
        )
    if not all(factor.is_floating_point() and torch.isfinite(factor.float()).all() for factor in (down, up)):
        raise EtherFileError(f"{where} is not made of finite floating-point numbers")
