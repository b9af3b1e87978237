"""The options of the training scripts: dataclasses from which the command line is derived.

Each field holds its one default, one help text and one validator; a group of fields is a dataclass, a script's options
are a dataclass of groups. Flags are named as in the example scripts of diffusers.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ether_diffusion.attention import BACKENDS, check_backend

# Chosen on the miniature (docs/training.md); a learning rate given by the user takes their place.
LEARNING_RATES = {"ether": 2e-3, "ether_plus": 1e-3}

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

Options = TypeVar("Options")


class InputError(ValueError):
    """What the user gave cannot be used. The message says where, what arrived and what fits; it needs no traceback."""


@dataclass(frozen=True)
class Fits:
    """A validator: a test of one value, and the words that end "got …, needs …"."""

    words: str
    test: Callable[[Any], bool]


POSITIVE = Fits("a whole number from 1", lambda value: value >= 1)
NOT_NEGATIVE = Fits("a whole number from 0", lambda value: value >= 0)
ABOVE_ZERO = Fits("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
FROM_ZERO = Fits("a finite number from 0", lambda value: math.isfinite(value) and value >= 0)
BELOW_ONE = Fits("a number from 0 and below 1", lambda value: 0 <= value < 1)
TEXT = Fits("a text that is not blank", lambda value: bool(value.strip()))
TEXTS = Fits("one text or more, none blank", lambda values: bool(values) and all(value.strip() for value in values))


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] | None = None,
    fits: Fits | None = None,
    free: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Without a default the flag is required.

    free: the adapter does not depend on it, so a run that goes on from a checkpoint may give another value.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "fits": fits, "free": free})


class OptionGroup:
    """Base of the groups: checks every value when it is made, from the command line or from Python."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, choices, fits = getattr(self, each.name), each.metadata["choices"], each.metadata["fits"]
            if value is None:
                continue
            if choices and value not in choices:
                raise InputError(f"--{each.name}: got {value!r}, needs one of {', '.join(choices)}")
            if fits and not fits.test(value):
                raise InputError(f"--{each.name}: got {value!r}, needs {fits.words}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """base model"""

    pretrained_model_name_or_path: str | None = option(
        "A diffusers pipeline, as a folder or an id on the Hub. Default: the miniature that comes with the package.",
        None,
        fits=TEXT,
    )
    revision: str | None = option("Branch, tag or commit of the model on the Hub.", None, fits=TEXT)
    variant: str | None = option('Variant of the weight files, such as "fp16".', None, fits=TEXT)


@dataclass(frozen=True, kw_only=True)
class InstanceDataOptions(OptionGroup):
    """instance pictures"""

    instance_data_dir: str = option("Folder with the pictures of the subject: JPEG, PNG, WebP, BMP.", fits=TEXT)
    instance_prompt: str = option('Prompt that names the subject, such as "a photo of sks dog".', fits=TEXT)
    resolution: int | None = option(
        "Side of the square training pictures in pixels. Default: the model's native size.", None, fits=POSITIVE
    )
    center_crop: bool = option("Crop at the centre. Default: at a random place.", False)
    random_flip: bool = option("Mirror each picture left to right with probability one half.", False)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(OptionGroup):
    """adapter"""

    method: str = option(
        "ether: one reflection per layer. ether_plus: starts at the base model, moves both sides, four times as many "
        "parameters.",
        "ether_plus",
        choices=("ether", "ether_plus"),
    )
    num_blocks: int = option("Blocks per layer; must divide the width of every adapted layer.", 1, fits=POSITIVE)
    target_modules: tuple[str, ...] | None = option(
        "Endings of the names of the UNet's layers to adapt. Default: the attention projections.", None, fits=TEXTS
    )
    train_text_encoder: bool = option("Adapt the text encoder as well.", False)
    text_encoder_target_modules: tuple[str, ...] | None = option(
        "As --target_modules, for the text encoder; needs --train_text_encoder.", None, fits=TEXTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoder_target_modules and not self.train_text_encoder:
            raise InputError("--text_encoder_target_modules: has no effect without --train_text_encoder; add it")


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(OptionGroup):
    """optimisation"""

    max_train_steps: int = option("Optimiser steps in all.", 200, fits=POSITIVE)
    train_batch_size: int = option("Pictures per process and forward pass.", 4, fits=POSITIVE)
    gradient_accumulation_steps: int = option("Forward passes per optimiser step.", 1, fits=POSITIVE)
    attention_backend: str | None = option(
        "What computes the denoiser's attention, through EtherAttnProcessor. Default: diffusers' own processor.",
        None,
        choices=BACKENDS,
    )
    enable_xformers_memory_efficient_attention: bool = option("The same as --attention_backend xformers.", False)
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, slower.", False)
    learning_rate: float | None = option(
        "Step size of AdamW. Default by method: "
        + ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
        + ".",
        None,
        fits=ABOVE_ZERO,
    )
    lr_scheduler: str = option("Course of the learning rate.", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option(
        "Optimiser steps over which the learning rate rises from 0 (every --lr_scheduler but constant).",
        0,
        fits=NOT_NEGATIVE,
    )
    adam_beta1: float = option("Decay of AdamW's first moment.", 0.9, fits=BELOW_ONE)
    adam_beta2: float = option("Decay of AdamW's second moment.", 0.999, fits=BELOW_ONE)
    adam_weight_decay: float = option(
        "Weight decay. Default 0: the length of a hyperplane's normal has no effect on the model, so decay would only "
        "raise the effective learning rate.",
        0.0,
        fits=FROM_ZERO,
    )
    adam_epsilon: float = option("Term that keeps AdamW's division finite.", 1e-8, fits=ABOVE_ZERO)
    max_grad_norm: float = option("Gradients are clipped to this norm over all that is trained.", 1.0, fits=ABOVE_ZERO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise InputError(
                f"--lr_warmup_steps: got {self.lr_warmup_steps}, has no effect with --lr_scheduler constant; "
                "use constant_with_warmup"
            )

        backend = self.attention
        if self.enable_xformers_memory_efficient_attention and backend != "xformers":
            raise InputError(
                f"--attention_backend {backend}: contradicts --enable_xformers_memory_efficient_attention; drop one"
            )
        if backend is not None:
            try:
                check_backend(backend)
            except ImportError as error:
                raise InputError(f"--attention_backend xformers: {error}") from error

    @property
    def attention(self) -> str | None:
        """The attention backend asked for by either flag."""
        if self.attention_backend is None and self.enable_xformers_memory_efficient_attention:
            return "xformers"
        return self.attention_backend

    def learning_rate_of(self, method: str) -> float:
        """The learning rate asked for, else the default of the method."""
        return LEARNING_RATES[method] if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """sample pictures"""

    validation_prompt: tuple[str, ...] | None = option(
        "Prompts to paint with base and tuned model after training. Default: the instance prompt.",
        None,
        fits=TEXTS,
        free=True,
    )
    num_validation_images: int = option("Pictures per prompt; 0 paints none.", 4, fits=NOT_NEGATIVE, free=True)
    num_inference_steps: int = option("Denoising steps per picture.", 25, fits=POSITIVE, free=True)
    guidance_scale: float = option("Classifier-free guidance of the pictures.", 7.5, fits=FROM_ZERO, free=True)


@dataclass(frozen=True, kw_only=True)
class StateOptions(OptionGroup):
    """stopping and going on"""

    checkpointing_steps: int = option(
        "Save a checkpoint, from which the run can go on, after every so many optimiser steps. Ctrl-C and SIGTERM "
        "save one as well.",
        500,
        fits=POSITIVE,
        free=True,
    )
    checkpoints_total_limit: int | None = option(
        "Keep at most so many checkpoints; the oldest goes when a new one is complete. Default: keep all.",
        None,
        fits=POSITIVE,
        free=True,
    )
    resume_from_checkpoint: str | None = option(
        'Go on from a checkpoint: its folder or name, or "latest" for the last whole one in --output_dir (where there '
        "is none, the run starts at the beginning). The result is that of a run that never stopped.",
        None,
        fits=TEXT,
        free=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(OptionGroup):
    """run"""

    output_dir: str = option(
        "Folder for the adapter, the model card and the pictures.", "ether-dreambooth", fits=TEXT, free=True
    )
    seed: int = option("Every random number follows from it; two runs with one seed agree.", 0, fits=NOT_NEGATIVE)
    mixed_precision: str | None = option(
        "Precision of the frozen weights and of the arithmetic; what is trained stays in float32. Default: as "
        "`accelerate launch` was told, else no.",
        None,
        choices=("no", "fp16", "bf16"),
    )
    report_to: str = option(
        "Where to log loss, learning rate and options.", "none", choices=("tensorboard", "none"), free=True
    )
    logging_dir: str = option("Folder of the logs, inside --output_dir unless absolute.", "logs", fits=TEXT, free=True)


def _groups(options: type) -> dict[str, type]:
    """Name -> dataclass of the groups that a script's options consist of."""
    hints = typing.get_type_hints(options)
    return {each.name: hints[each.name] for each in fields(options)}


def _arguments(annotation: Any) -> dict[str, Any]:
    """What argparse must know about a field's type: bool, a scalar, a tuple of texts, each of them perhaps None."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (each for each in annotation.__args__ if each is not type(None))
    if annotation is bool:
        return {"action": "store_true"}
    if typing.get_origin(annotation) is tuple:
        return {"nargs": "+", "type": typing.get_args(annotation)[0]}
    return {"type": annotation}


def build_parser(options: type, description: str | None = None) -> argparse.ArgumentParser:
    """The command line of a dataclass of option groups.

    Args:
        options: a dataclass whose fields are annotated with subclasses of `OptionGroup`.
        description: what `--help` says first.
    """
    # Abbreviated flags would change their meaning when a flag is added.
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for group in _groups(options).values():
        section = parser.add_argument_group((group.__doc__ or group.__name__).strip())
        hints = typing.get_type_hints(group)
        for each in fields(group):
            arguments = _arguments(hints[each.name])
            if each.default is dataclasses.MISSING:
                arguments["required"] = True
            elif arguments.get("action") != "store_true":
                arguments["default"] = each.default
            if each.metadata["choices"]:
                arguments["choices"] = each.metadata["choices"]
            text = each.metadata["help"]
            if each.default not in (dataclasses.MISSING, None, False) and "Default" not in text:
                text += f" Default: {each.default}."
            section.add_argument(f"--{each.name}", help=text.replace("%", "%%"), **arguments)
    return parser


def parse_options(
    options: type[Options], arguments: Sequence[str] | None = None, description: str | None = None
) -> Options:
    """Read a command line into a dataclass of option groups.

    Args:
        options: as for `build_parser`.
        arguments: the words after the script's name; `sys.argv[1:]` if None.
        description: what `--help` says first.

    Raises:
        SystemExit: an unknown flag, a missing one, a value of the wrong type or outside the choices.
        InputError: a value that does not fit.
    """
    parsed = vars(build_parser(options, description).parse_args(arguments))
    made = {}
    for name, group in _groups(options).items():
        values = {each.name: parsed[each.name] for each in fields(group)}
        made[name] = group(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )
    return options(**made)


def flatten(options: Any) -> dict[str, bool | int | float | str]:
    """All options as one flat dict of plain values, as experiment trackers take them."""
    flat: dict[str, bool | int | float | str] = {}
    for group in dataclasses.asdict(options).values():
        for name, value in group.items():
            if isinstance(value, tuple):
                value = ", ".join(value)
            flat[name] = "default" if value is None else value
    return flat


def binding(options: Any) -> dict[str, bool | int | float | str]:
    """The flat options that the adapter depends on: a run that goes on from a checkpoint has to repeat them."""
    free = {each.name for group in _groups(type(options)).values() for each in fields(group) if each.metadata["free"]}
    return {name: value for name, value in flatten(options).items() if name not in free}
