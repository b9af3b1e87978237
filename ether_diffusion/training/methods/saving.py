"""Files of what was trained: written complete or not at all, and loaded again, for every method."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftConfig, PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ether_diffusion.adapters.reading import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.base_models import open_pipeline
from ether_diffusion.errors import InputError
from ether_diffusion.files import new_entries
from ether_diffusion.training.methods.configs import Method
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs

LORA_NAME = "pytorch_lora_weights.safetensors"


def save_trained(
    pipe: DiffusionPipeline,
    configs: Configs,
    folder: Path,
    *,
    method: Method,
    metadata: Mapping[str, str],
) -> Path:
    """Write what was trained, so that `loading_code` puts it on a pipeline again.

    ETHER: the file of `save_ether_weights`. LoRA: that of diffusers' `save_lora_weights`. Other adapters: for each
    component a folder as PEFT saves it. All weights: a pipeline. Each is written beside its place and moved there when
    it is complete.

    Args:
        pipe, configs, method: of the training; the configs are of the components that were trained.
        folder: created if need be.
        metadata: more to record in the file of weights; a pipeline has no place for it.

    Returns:
        The file of weights; where there are several, the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    if method.layout == "ether":
        return pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata)
    with new_entries(folder, last=DiffusionPipeline.config_name) as partial:
        if method.layout == "full":
            pipe.save_pretrained(partial)
        elif method.layout == "lora":
            _write_lora(partial, pipe, configs, metadata)
        else:
            for component in configs:
                _write_peft(partial / component, getattr(pipe, component), metadata)
    return folder / LORA_NAME if method.layout == "lora" else folder


def _write_lora(folder: Path, pipe: DiffusionPipeline, configs: Configs, metadata: Mapping[str, str]) -> None:
    arguments: dict[str, Any] = {}
    for component in configs:
        model = getattr(pipe, component)
        tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        # Transformers are read under PEFT's names; of diffusers' own, not all would be found again.
        tensors = tensors if component == "transformer" else convert_state_dict_to_diffusers(tensors)
        arguments[f"{component}_lora_layers"] = tensors
        arguments[f"{component}_lora_adapter_metadata"] = _public_config(model).to_dict()
    pipe.save_lora_weights(folder, **arguments)
    path = folder / LORA_NAME  # once more, with our metadata beside that of diffusers
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    save_file(load_file(path), path, {**metadata, **header})


def _write_peft(folder: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name, child in layer.named_children():
                if isinstance(child, BufferDict):  # VeRA's shared matrices, under the name that its tuner gives them
                    state[f"base_model.{name}.{ADAPTER_NAME}"] = child[ADAPTER_NAME]
    tensors = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    _public_config(model).save_pretrained(folder)
    save_file(
        {
            name if name.startswith("base_model.") else f"base_model.model.{name}": tensor.detach().cpu().clone()
            for name, tensor in tensors.items()
        },
        folder / PEFT_WEIGHTS_NAME,
        {"format": "pt", **metadata},
    )


def _public_config(model: nn.Module) -> PeftConfig:
    """The config of the adapter as files carry it: to be loaded for use, in a fixed order, and without local paths."""
    config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    config.inference_mode, config.base_model_name_or_path = True, None
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    return config


def load_trained(base: DiffusionPipeline | str | Path, folder: Path) -> DiffusionPipeline:
    """A pipeline with what training has left in a folder, whichever the method, as the libraries load it.

    Args:
        base: what was trained, as a pipeline or where it lies; not opened where all weights were trained.
        folder: the output folder of the run.

    Raises:
        InputError: nothing in the folder that `save_trained` writes.
    """
    names = (WEIGHTS_NAME, LORA_NAME, DiffusionPipeline.config_name)
    ether, lora, full = ((folder / name).is_file() for name in names)
    if full and not (ether or lora):
        return open_pipeline(folder)
    pipe = base if isinstance(base, DiffusionPipeline) else open_pipeline(base)
    adapters = sorted(folder.glob(f"*/{PEFT_CONFIG_NAME}"))
    if ether:
        pipe.load_ether_weights(folder)
    elif lora:
        pipe.load_lora_weights(folder)
    elif not adapters:
        raise InputError(f"{folder}: holds no weights of a training; needs the --output_dir of one that has ended")
    else:
        for config in adapters:
            PeftModel.from_pretrained(getattr(pipe, config.parent.name), config.parent)
    return pipe


def loading_code(method: Method, components: Sequence[str], absent: Iterable[str] = ()) -> str:
    """The Python lines that put what `save_trained` wrote on a `pipe`; of all weights, those that make the pipe.

    In them `{where}` stands for the quoted name of the folder or repository.

    absent: components that the pipeline does without, though its class asks for them.
    """
    if method.layout == "ether":
        return "import ether_diffusion\n\npipe.load_ether_weights({where})"
    if method.layout == "lora":
        return "pipe.load_lora_weights({where})"
    if method.layout == "full":
        given = ", ".join(["{where}", *(f"{name}=None" for name in absent)])
        return f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({given})"
    lines = (f'PeftModel.from_pretrained(pipe.{name}, {{where}}, subfolder="{name}")' for name in components)
    return "\n".join(["from peft import PeftModel", "", *lines])
