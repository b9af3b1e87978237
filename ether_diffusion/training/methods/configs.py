"""The methods of training: ETHER, those of PEFT, and all weights; their configs, and files that load again."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import BOFTConfig, HRAConfig, LoraConfig, PeftConfig, VeraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ether_diffusion.adapters.reading import PEFT_WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training.families import Family
from ether_diffusion.training.methods.injection import ADAPTER_NAME, FittedOFTConfig
from ether_diffusion.training.options import LEARNING_RATES, RANKED_METHODS, AdapterOptions
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.model import ATTENTION, CLIP_ATTENTION

TITLES = {
    "ether": "ETHER",
    "ether_plus": "ETHER+",
    "lora": "LoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "hra": "HRA",
    "vera": "VeRA",
    "full": "full finetuning",
    "none": "no adapter",
}
PAPERS = {
    "ether": "2405.20271",
    "ether_plus": "2405.20271",
    "lora": "2106.09685",
    "oft": "2306.07280",
    "boft": "2311.06243",
    "hra": "2405.17484",
    "vera": "2310.11454",
}
LORA_NAME = "pytorch_lora_weights.safetensors"
INDEX_NAME = "model_index.json"

UNSUITED = {
    "POLY": "needs the number of a task with every input",
    "SHADOW": "wraps a language model",
    "TRAINABLE_TOKENS": "trains rows of an embedding",
    "XLORA": "mixes adapters that are trained already",
}
"""PEFT types whose tuners could be named like the others, and why they are none to train a denoiser with."""
BUILT_OF = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode")
"""What a saved config says of the model it was saved from; no part of the method."""
PLACES = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields that name layers: of the denoiser, so they are left out for text encoders."""
NOT_IN_LORA_FILES = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of LoRA that the loaders of diffusers' pipelines do not know."""
SOUND_STARTS = (True, False, "gaussian", "orthogonal")
"""LoRA's starts that leave the weights of the model alone; a file of factors cannot restore what the others change."""


@dataclass(frozen=True)
class Method:
    """What is trained.

    name: as for `--method`; of an `--adapter_config`, that of the method it holds, else the lower-case PEFT type.
    title: the name for people.
    learning_rate: its default, or None where there is none.
    paper: its arXiv id, where known.
    config: what `--adapter_config` holds, or None.
    """

    name: str
    title: str
    learning_rate: float | None
    paper: str | None
    config: PeftConfig | None = None

    @property
    def layout(self) -> Literal["ether", "lora", "peft", "full"]:
        """What is saved: a file of a kind that pipelines load, a PEFT folder per component, or a pipeline."""
        if self.name in ("ether", "ether_plus"):
            return "ether"
        return self.name if self.name in ("lora", "full") else "peft"


def read_method(options: AdapterOptions) -> Method:
    """The method that the options ask for.

    Raises:
        InputError: an `--adapter_config` that is not there or is no PEFT config, or one whose type or values cannot be
            trained or saved here.
    """
    if options.adapter_config is None:
        name, config = options.method_name, None
    else:
        config = _read_config(options.adapter_config)
        name = config.method if isinstance(config, EtherConfig) else str(config.peft_type.value).lower()
    return Method(
        name=name,
        title=TITLES.get(name, name.upper()),
        learning_rate=LEARNING_RATES.get(name),
        paper=PAPERS.get(name),
        config=config,
    )


# Configs ------------------------------------------------------------------------------------------------------


def _read_config(path: str) -> PeftConfig:
    where = f"--adapter_config {path}"
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error}); needs a JSON file") from error
    except (ValueError, RecursionError) as error:  # of ValueErrors: not UTF-8, not JSON
        raise InputError(f"{where}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds a JSON {type(values).__name__}, needs an object")
    config_class = _config_class(where, values.get("peft_type"))
    known = {each.name for each in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise InputError(
            f"{where}: {config_class.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    values = {name: value for name, value in values.items() if name not in (*BUILT_OF, "peft_type", "runtime_config")}
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            raise InputError(f"{where}: got {name}={value!r}, needs {_words(hints[name])}")
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    _check_can_be_saved(where, config)
    return config


def _config_class(where: str, peft_type: Any) -> type[PeftConfig]:
    """The config class of a PEFT type that injects layers. Raises `InputError` for any other."""
    suited = {
        kind.value: PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if _obstacle(kind.value, tuner) is None
    }
    if isinstance(peft_type, str) and peft_type in suited:
        return suited[peft_type]
    reasons = {kind.value: _obstacle(kind.value, tuner) for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if peft_type is None:
        problem = "has no peft_type"
    elif isinstance(peft_type, str) and reasons.get(peft_type):
        problem = f"peft_type {peft_type} {reasons[peft_type]}"
    else:
        problem = f"peft_type {peft_type!r} is unknown"
    raise InputError(f"{where}: {problem}; needs one of {', '.join(sorted(suited))}")


def _obstacle(peft_type: str, tuner: type) -> str | None:
    """Why a PEFT type cannot be trained here, in words, or None where it can."""
    if getattr(tuner, "tuner_layer_cls", None) is None and peft_type not in UNSUITED:
        return "learns prompts and injects no layers"
    if getattr(tuner, "uses_shared_state", False) and peft_type != "VERA":
        return "trains vectors that lie outside of the layers"
    return UNSUITED.get(peft_type)


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value from JSON is of a type; of a dict or list only that it is one."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, each) for each in typing.get_args(annotation))
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in typing.get_args(annotation))
    kind = origin or annotation
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, list, dict, type(None)):
        return isinstance(value, kind)
    if kind in (set, tuple):
        return isinstance(value, list)
    return True  # another dataclass, or a type of PEFT's own, which it checks itself


def _words(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)


def _check_can_be_saved(where: str, config: PeftConfig) -> None:
    """Refuse what a file of this method could not hold, before hours of training."""
    is_lora = config.peft_type == "LORA"
    if isinstance(config, EtherConfig) or is_lora:
        for name, none in (("bias", "none"), ("modules_to_save", None)):
            value = getattr(config, name)
            if value and value != none:
                raise InputError(
                    f"{where}: {name}={value!r} trains weights of the model itself, which a file of "
                    f"{'LoRA' if is_lora else 'ETHER'} weights does not hold; drop it"
                )
    if not is_lora:
        return
    for name in NOT_IN_LORA_FILES:
        if value := getattr(config, name, None):
            raise InputError(f"{where}: {name}={value!r} is nothing that diffusers loads from a file of LoRA weights")
    if config.init_lora_weights not in SOUND_STARTS:
        raise InputError(
            f"{where}: init_lora_weights={config.init_lora_weights!r} changes the weights of the model, which a file "
            f"of LoRA weights does not hold; needs one of {', '.join(map(repr, SOUND_STARTS))}"
        )


def configs_of(method: Method, family: type[Family], options: AdapterOptions) -> dict[str, PeftConfig | None]:
    """Component -> config, for the components that are trained; None where all of its weights are.

    Raises:
        InputError: an adapter that the text encoders could not be loaded with.
    """
    given = {family.denoiser: options.target_modules}
    if options.train_text_encoder:
        given |= dict.fromkeys(family.text_encoders, options.text_encoder_target_modules)
    if method.name == "none":  # of control training, where something else is trained
        return {}
    if method.name == "full":
        return dict.fromkeys(given)
    if options.train_text_encoder and getattr(method.config, "use_dora", False):
        raise InputError(
            "--train_text_encoder: with use_dora in --adapter_config, transformers loses the magnitudes when the text "
            "encoders' weights are loaded; drop one"
        )
    configs: dict[str, PeftConfig | None] = {}
    for component, names in given.items():
        is_denoiser = component == family.denoiser
        default = ATTENTION if is_denoiser else CLIP_ATTENTION
        if method.config is None:
            configs[component] = _default_config(method.name, list(names or default), options)
            continue
        config = copy.deepcopy(method.config)
        if not is_denoiser:
            for each in dataclasses.fields(config):
                if each.name in PLACES:
                    made = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
                    setattr(config, each.name, made)
        if names or not is_denoiser or config.target_modules is None:
            config.target_modules = set(names or default)
        configs[component] = config
    return configs


def _default_config(name: str, targets: list[str], options: AdapterOptions) -> PeftConfig:
    rank = RANKED_METHODS.get(name) if options.rank is None else options.rank
    if name == "lora":  # alpha = r, as in diffusers' DreamBooth script
        return LoraConfig(target_modules=targets, r=rank, lora_alpha=rank, init_lora_weights="gaussian")
    if name == "oft":
        return FittedOFTConfig(target_modules=targets, oft_block_size=32)
    if name == "boft":
        return BOFTConfig(target_modules=targets, boft_block_size=4, boft_n_butterfly_factor=1)
    if name == "hra":
        return HRAConfig(target_modules=targets, r=rank)
    if name == "vera":
        return VeraConfig(target_modules=targets, r=rank)
    return EtherConfig(target_modules=targets, method=name, num_blocks=options.num_blocks)


# Files --------------------------------------------------------------------------------------------------------


def save_trained(
    pipe: DiffusionPipeline,
    configs: Mapping[str, PeftConfig | None],
    folder: Path,
    *,
    method: Method,
    metadata: Mapping[str, str],
) -> Path:
    """Write what was trained, so that `loading_code` puts it on a pipeline again.

    ETHER: the file of `save_ether_weights`. LoRA: that of diffusers' `save_lora_weights`. Other adapters: for each
    component a folder as PEFT saves it. All weights: a pipeline. Each is written beside its place and moved there when
    it is whole.

    Args:
        pipe: holds what was trained.
        configs: component -> config, of the components that were trained.
        folder: created if need be.
        method: of the training.
        metadata: more to record in the file of weights; a pipeline has no place for it.

    Returns:
        The file of weights; where there are several, the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    if method.layout == "ether":
        return pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".saving."))
    try:
        if method.layout == "full":
            pipe.save_pretrained(partial)
        elif method.layout == "lora":
            _write_lora(partial, pipe, configs, metadata)
        else:
            for component in configs:
                _write_peft(partial / component, getattr(pipe, component), metadata)
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / LORA_NAME if method.layout == "lora" else folder


def _write_lora(
    folder: Path, pipe: DiffusionPipeline, configs: Mapping[str, PeftConfig | None], metadata: Mapping[str, str]
) -> None:
    arguments: dict[str, Any] = {}
    for component in configs:
        model = getattr(pipe, component)
        tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        arguments[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(tensors)
        arguments[f"{component}_lora_adapter_metadata"] = _public_config(model).to_dict()
    pipe.save_lora_weights(folder, **arguments)
    _add_metadata(folder / LORA_NAME, metadata)


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


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
    save_file(load_file(path), path, {**metadata, **header})


def _move_into_place(source: Path, folder: Path) -> None:
    """Move all of `source` into `folder`, in place of what has its name there; a pipeline's index comes last."""
    entries = sorted(source.iterdir(), key=lambda each: (each.name == INDEX_NAME, each.name))
    old = Path(tempfile.mkdtemp(dir=folder, prefix=".replaced."))
    try:
        for entry in entries:
            place = folder / entry.name
            if place.is_dir() and not place.is_symlink():  # a folder cannot be replaced in one step
                place.rename(old / entry.name)
            os.replace(entry, place)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def loading_code(method: Method, components: Sequence[str]) -> str:
    """The Python lines that put what `save_trained` wrote on a `pipe`; of all weights, those that make the pipe.

    Args:
        method: of the training.
        components: those that were trained.

    Returns:
        Lines in which `{where}` stands for the quoted name of the folder or repository.
    """
    if method.layout == "ether":
        return "import ether_diffusion\n\npipe.load_ether_weights({where})"
    if method.layout == "lora":
        return "pipe.load_lora_weights({where})"
    if method.layout == "full":
        return "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({where})"
    lines = (f'PeftModel.from_pretrained(pipe.{name}, {{where}}, subfolder="{name}")' for name in components)
    return "\n".join(["from peft import PeftModel", "", *lines])
