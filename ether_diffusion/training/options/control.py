"""The options of control training, besides those of every training; named as in diffusers' examples/controlnet."""

from dataclasses import dataclass
from typing import ClassVar

from ether_diffusion.control.kinds import ENCODER_KINDS
from ether_diffusion.errors import InputError
from ether_diffusion.images import INTERPOLATIONS, rising
from ether_diffusion.training.options.base import ABOVE_ZERO, NOT_NEGATIVE, PART, POSITIVE, Fits, OptionGroup, option
from ether_diffusion.training.options.model import METHODS, AdapterOptions
from ether_diffusion.training.options.noise import FlowOptions
from ether_diffusion.training.options.optimization import OptimizationOptions
from ether_diffusion.training.options.run import RunOptions, TrainingOptions, ValidationOptions

RANGE = Fits("two finite numbers as low,high", lambda text: parse_range(text) is not None)


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Text that fits `RANGE` as (low, high); None without one."""
    try:
        low, high = rising([float(number) for number in (text or "").split(",")])
    except ValueError:
        return None
    return low, high


CONTROL_TYPES = ("light", "controlnet")
NO_METHOD = "none"
CONTROL_LEARNING_RATE, CONTROL_STEPS = 1e-3, 2000


@dataclass(frozen=True, kw_only=True)
class ControlOptions(OptionGroup):
    """control"""

    control_type: str = option(
        "light: a small encoder adds the features of the control image once, after the denoiser's first layer. "
        "controlnet: a copy of the UNet's first half, or of the first blocks of FLUX.1 or Stable Diffusion 3, under "
        "the method; what reads the control image and what begins at zero is trained as it is.",
        "light",
        choices=CONTROL_TYPES,
    )
    control_encoder: str | None = option(
        "Encoder of --control_type light. latent: one linear map of the control image's latents, which is added after "
        "a transformer's first layer as more channels of its input would be. conv: small convolutions that look at "
        "the image itself, for flat label maps and for UNets. Default: latent with a transformer, conv with a UNet.",
        None,
        choices=ENCODER_KINDS,
        without="control_type controlnet",
    )
    control_lr: float = option(
        "Learning rate of what is trained besides the method: the light encoder, or of a ControlNet what reads the "
        "control image, and the layers that begin at zero.",
        CONTROL_LEARNING_RATE,
        fits=ABOVE_ZERO,
    )
    conditioning_interpolation: str = option(
        "How control images are brought to size: nearest leaves label maps without new colours, lanczos is smooth.",
        "nearest",
        choices=tuple(INTERPOLATIONS),
    )
    conditioning_range: str | None = option(
        'What is black and what is white in control images of more than 8 bits, as "0,4095"; values beyond count as '
        "these. Default: 0,1 for floats, 0,65535 for integers, 0,4095 for TIFF files of 12 bits; values beyond are "
        "then refused.",
        None,
        fits=RANGE,
    )
    control_classes: str | None = option(
        "What the colours of control images stand for, the background first, as a JSON object or a file that holds "
        'one: {"sky": "#0000ff"}. It goes into the adapter\'s file, and gives who draws maps their palette. Default: '
        "the colours of the first validation image, where they are few.",
        None,
        free=True,
        path=True,
    )
    controlnet_model_name_or_path: str | None = option(
        "A ControlNet to start from, a folder or an id on the Hub; needs --control_type controlnet. Default: a copy "
        "of the denoiser's first layers.",
        None,
        needs="control_type controlnet",
        path=True,
    )
    num_double_layers: int | None = option(
        "Blocks with streams of their own for image and text that a ControlNet copies from a transformer. Default: 4 "
        "of FLUX.1, 12 of Stable Diffusion 3.",
        None,
        fits=NOT_NEGATIVE,
        needs="control_type controlnet",
        without="controlnet_model_name_or_path",
    )
    num_single_layers: int | None = option(
        "Blocks with one stream that a ControlNet copies from FLUX.1. Default: 4.",
        None,
        fits=NOT_NEGATIVE,
        needs="control_type controlnet",
        without="controlnet_model_name_or_path",
    )


@dataclass(frozen=True, kw_only=True)
class ControlDataOptions(OptionGroup):
    """images and control images"""

    train_data_dir: str | None = option(
        "Folder with images, control images and a metadata.jsonl or metadata.csv: for each image a line with "
        "file_name, the path of its control image and its caption.",
        None,
        free=True,
        path=True,
    )
    dataset_name: str | None = option(
        "In place of --train_data_dir: a data set on the Hub or a local folder; its split train is used.",
        None,
        free=True,
        path=True,
    )
    dataset_config_name: str | None = option("Configuration of the data set.", None, needs="dataset_name", free=True)
    image_column: str = option("Column with the images.", "image")
    conditioning_image_column: str = option("Column with the control images.", "conditioning_image")
    caption_column: str = option("Column with the captions; of several captions one is drawn for each sample.", "text")
    max_train_samples: int | None = option("Use only the first so many rows.", None, fits=POSITIVE)
    proportion_empty_prompts: float = option(
        "Part of the samples that is trained without a prompt, so that control works without one.",
        0.0,
        fits=PART,
    )
    streaming: bool = option(
        "Read the data as they come, for sets that do not fit on the disk; the order is shuffled within 1,000 rows.",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_one_given("train_data_dir", "dataset_name")


@dataclass(frozen=True, kw_only=True)
class ControlAdapterOptions(AdapterOptions):
    """method"""

    method: str | None = option(
        "As in DreamBooth training: ether, ether_plus, lora, oft, boft, hra, vera, full; none trains the encoder (or "
        "stem and zero convolutions) alone. Default: ether_plus.",
        None,
        choices=(NO_METHOD, *METHODS),
        without="adapter_config",
    )


@dataclass(frozen=True, kw_only=True)
class ControlOptimizationOptions(OptimizationOptions):
    """optimisation"""

    default_steps: ClassVar[int] = CONTROL_STEPS

    max_train_steps: int | None = option(
        f"Optimiser steps in all. Default: {CONTROL_STEPS}, or as many as --num_train_epochs needs.",
        None,
        fits=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class ControlRunOptions(RunOptions):
    """run"""

    output_dir: str = option(
        "Folder for what is trained, the model card and the images.",
        "ether-control",
        free=True,
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class ControlValidationOptions(ValidationOptions):
    """sample images"""

    validation_image: tuple[str, ...] | None = option(
        "Control images to generate from, one for each --validation_prompt (or one for all). Default: the first "
        "of the training data.",
        None,
        free=True,
        path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        images, prompts = self.validation_image or (), self.validation_prompt or ()
        if prompts and not images:
            raise InputError("--validation_prompt: has no effect without --validation_image; add it")
        if images and not prompts:
            raise InputError("--validation_image: needs a --validation_prompt for each image; add it")
        if len(prompts) != len(images) and 1 not in (len(prompts), len(images)):
            raise InputError(
                f"--validation_image: got {len(images)} images for {len(prompts)} prompts, needs as many, or one of "
                "either for all"
            )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(path of the control image, prompt) of each row."""
        if self.validation_image is None or self.validation_prompt is None:
            return []
        images, prompts = self.validation_image, self.validation_prompt
        count = max(len(images), len(prompts))
        return list(zip(images * (count // len(images)), prompts * (count // len(prompts)), strict=True))


@dataclass(frozen=True, kw_only=True)
class ControlTrainingOptions(TrainingOptions):
    """Options of `train_controlnet_ether.py`."""

    data: ControlDataOptions
    control: ControlOptions
    adapter: ControlAdapterOptions
    optimization: ControlOptimizationOptions
    flow: FlowOptions
    validation: ControlValidationOptions
    run: ControlRunOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        light, data = self.control.control_type == "light", self.data
        for flag in ("train_data_dir", "dataset_name"):  # data sets are read with all of their folders
            self.run.check_apart(flag, getattr(data, flag), with_folders=True)
        if data.streaming:
            for flag in ("cache_latents", "pre_compute_text_embeddings"):
                if getattr(self.performance, flag):
                    raise InputError(f"--{flag}: cannot go with --streaming, which never holds all data; drop one")
            if self.optimization.num_train_epochs is not None or self.validation.validation_epochs is not None:
                raise InputError("--streaming: has no epochs; use --max_train_steps and --validation_steps")
        if not light and self.adapter.train_text_encoder:
            raise InputError(
                "--train_text_encoder: has no effect with --control_type controlnet, whose base is frozen"
            )
