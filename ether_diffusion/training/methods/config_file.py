"""The file of `--adapter_config`: a PEFT config as JSON, read and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from pydantic import TypeAdapter, ValidationError

from ether_diffusion.errors import InputError
from ether_diffusion.tuner.config import EtherConfig

UNSUITED = {
    "POLY": "needs the number of a task with every input",
    "SHADOW": "wraps a language model",
    "TRAINABLE_TOKENS": "trains rows of an embedding",
    "XLORA": "mixes adapters that are trained already",
}
"""PEFT types whose tuners could be named like the others, and why they are none to train a denoiser with."""
FIELDS_OF_THE_BASE = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
    "task_type",
)  # fmt: skip
"""What a saved config says of the model it was saved from; no part of the method."""
NOT_IN_LORA_FILES = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Fields of LoRA that the loaders of diffusers' pipelines do not know."""
LORA_STARTS = (True, False, "gaussian", "orthogonal")
"""LoRA's starts that leave the weights of the model alone; a file of factors cannot restore what the others change."""


def read_config(path: str) -> PeftConfig:
    """The PEFT config in a JSON file, as `PeftConfig.save_pretrained` or a person wrote it.

    Raises:
        InputError: no such file, no PEFT config, or one whose type or values cannot be trained or saved here.
    """
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
    values = {name: value for name, value in values.items() if name not in (*FIELDS_OF_THE_BASE, "peft_type")}
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        try:
            # As JSON, where a list may stand for a set or a tuple.
            TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            needed = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise InputError(f"{where}: got {name}={value!r}, needs {needed}") from error
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    _check_can_be_saved(where, config)
    return config


def _config_class(where: str, peft_type: Any) -> type[PeftConfig]:
    """The config class of a PEFT type that injects layers."""
    obstacles = {kind.value: _obstacle(kind.value, tuner) for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if peft_type is None:
        problem = "has no peft_type"
    elif not isinstance(peft_type, str) or peft_type not in obstacles:
        problem = f"peft_type {peft_type!r} is unknown"
    elif obstacles[peft_type] is None:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    else:
        problem = f"peft_type {peft_type} {obstacles[peft_type]}"
    fits = ", ".join(sorted(kind for kind, obstacle in obstacles.items() if obstacle is None))
    raise InputError(f"{where}: {problem}; needs one of {fits}")


def _obstacle(peft_type: str, tuner: type) -> str | None:
    """Why a PEFT type cannot be trained here, in words, or None where it can."""
    if getattr(tuner, "tuner_layer_cls", None) is None and peft_type not in UNSUITED:
        return "learns prompts and injects no layers"
    if getattr(tuner, "uses_shared_state", False) and peft_type != "VERA":
        return "trains vectors that lie outside of the layers"
    return UNSUITED.get(peft_type)


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
    if config.init_lora_weights not in LORA_STARTS:
        raise InputError(
            f"{where}: init_lora_weights={config.init_lora_weights!r} changes the weights of the model, which a file "
            f"of LoRA weights does not hold; needs one of {', '.join(map(repr, LORA_STARTS))}"
        )
