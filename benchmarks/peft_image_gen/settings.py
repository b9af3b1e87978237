"""The benchmark's setting, and the experiments that are run in it: a folder for each, as PEFT's own runner takes them.

Source: method_comparison/image-gen of github.com/huggingface/peft (default_training_params.json, run.py, data.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import ether_diffusion  # noqa: F401  (registers ETHER with PEFT)
from ether_diffusion.errors import InputError

MODEL = "black-forest-labs/FLUX.2-klein-base-4B"
DATA = "peft-internal-testing/cat-image-dataset"
DINO = "facebook/dinov2-base"
EXPERIMENTS = Path(__file__).parent / "experiments"
PARAMETERS_NAME = "training_params.json"
TEXT_LAYERS = {"benchmark": (10, 20, 30), "pipeline": (9, 18, 27)}
"""Layers of the text encoder whose states are the text; klein's own pipeline takes others than the benchmark."""
WITHOUT_EFFECT = ("eval_steps", "sample_image_prompts")
"""Parameters of PEFT's runner that change no figure: how often it validates, what it generates to be looked at."""

# In the order of the rows of the data set.
PROMPTS = (
    "sks cat sitting on a chair in front of a box of chocolates",
    "sks cat playing on the Steam Deck",
    "sks cat wearing a necklace while sitting in a box on a sofa",
    "a box with four donuts in front of sks cat",
    "sks cat wearing a pink veil with flowers on it and a dagger made out of yellow cardboard",
    "sks cat between two pillows, with one pillow showing a polar bear and the other a fox",
    "sks cat with an espresso reading the newspaper",
    "a close up of a hand petting sks cat on the head",
    "sks cat opens a white door",
    'sks cat with a VIP "all access" pass',
    'sks cat in front of a monitor showing the video game "RimWorld"',
    "sks cat reads a newspaper about cannabis",
    'sks cat reading the newspaper with the title "DIE BOX"',
    "sks cat being fed sushi",
    "sks cat in front of a box of tomatoes",
    "a gingerbread house in front of sks cat",
    "sks cat is wearing a Wednesday Addams costume",
    "sks cat looks skeptical as he reads a magazine depicting a black cat",
    "sks cat wearing a striped scarf",
    "sleepy sks cat lying in bed covered by a blue blanket",
)
DRIFT_PROMPTS = (
    "a photo of cat",
    "a color drawing of cat",
    "cat sitting in a bathtub",
    "cat looks into a mirror",
    "a photo of cat next to a tree",
    "the Mona Lisa but she looks angry",
    "a dog holding a sign that says hello world",
    "a photo of the Eiffel tower at night",
    "an astronaut riding a horse",
    "3d design concept of a chair that looks like an avocado",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a table have in common.

    repeats: images of each test prompt. text_layers: whose states of the text encoder are the prompt.
    """

    dtype: str = "bfloat16"
    resolution: int = 512
    num_inference_steps: int = 20
    guidance_scale: float = 3.5
    repeats: int = 3
    seed: int = 0
    max_sequence_length: int = 512
    text_layers: tuple[int, ...] = TEXT_LAYERS["benchmark"]
    drift_prompts: tuple[str, ...] = DRIFT_PROMPTS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Training(BaseModel):
    """What an experiment may set for itself, named as in PEFT's runner. The optimizer is one of `torch.optim`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int = Field(750, gt=0)
    batch_size: int = Field(2, gt=0)
    grad_norm_clip: float = Field(1.0, ge=0)
    optimizer_type: str = "AdamW"
    optimizer_kwargs: Mapping[str, Any] = {"lr": 1e-4, "weight_decay": 1e-4}
    use_gc: bool = True
    autocast_adapter_dtype: bool = True

    @field_validator("optimizer_type")
    @classmethod
    def _is_an_optimizer(cls, name: str) -> str:
        kind = getattr(torch.optim, name, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(f"torch.optim has no optimizer {name!r}")
        return name

    @field_validator("optimizer_kwargs")
    @classmethod
    def _has_a_rate(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(given.get("lr"), float | int) or not given["lr"] > 0:
            raise ValueError("needs an lr above 0")
        return given


@dataclass(frozen=True)
class Experiment:
    """A method with its parameters. name: that of its folder and of the folder around it, as in PEFT's results."""

    name: str
    config: PeftConfig
    training: Training


def read_experiment(place: str) -> Experiment:
    """The experiment in a folder, or of a name such as "ether/flux2-klein-default" beside this file.

    As in PEFT's runner, what `training_params.json` holds takes the place of a default whole: of `optimizer_kwargs`
    without a weight decay, that of the optimizer counts.

    Raises:
        InputError: no such folder, no config that PEFT reads, or parameters that are not the experiment's to set.
    """
    folder = next((each for each in (Path(place), EXPERIMENTS / place) if each.is_dir()), None)
    if folder is None:
        known = ", ".join(sorted(str(each.parent.relative_to(EXPERIMENTS)) for each in EXPERIMENTS.rglob(CONFIG_NAME)))
        raise InputError(f"--experiments {place}: there is no such folder; here are {known}")
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"--experiments {place}: holds no {CONFIG_NAME}; finetuning of all weights is not covered")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder / CONFIG_NAME}: PEFT cannot read it ({told})") from error
    folder = folder.resolve()
    return Experiment(f"{folder.parent.name}/{folder.name}", config, _read_training(folder / PARAMETERS_NAME))


def _read_training(file: Path) -> Training:
    if not file.is_file():
        return Training()
    try:
        values = json.loads(file.read_text("utf-8"))
        return Training(**{name: value for name, value in values.items() if name not in WITHOUT_EFFECT})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        fits = ", ".join(Training.model_fields)
        raise InputError(f"{file}: {told}; an experiment may set {fits}") from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: is no JSON object ({error})") from error
