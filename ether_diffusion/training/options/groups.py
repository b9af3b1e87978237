"""The options of the training scripts. Flags are named as in the example scripts of diffusers."""

import dataclasses
import math
import re
from dataclasses import dataclass

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.command_line import (
    ABOVE_ZERO,
    BELOW_ONE,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    TEXTS,
    Fits,
    OptionGroup,
    option,
)
from ether_diffusion.tuner.attention import BACKENDS, check_backend

# Chosen on the miniature (docs/training.md); a learning rate given by the user takes their place.
LEARNING_RATES = {
    "ether": 2e-3,
    "ether_plus": 1e-3,
    "lora": 3e-4,
    "oft": 3e-4,
    "boft": 1e-3,
    "hra": 3e-3,
    "vera": 3e-3,
    "full": 1e-5,
}
PRODIGY_LEARNING_RATE = 1.0
"""Prodigy finds the size of its steps itself; the learning rate only scales it."""

METHODS = tuple(LEARNING_RATES)
DEFAULT_METHOD, DEFAULT_STEPS = "ether_plus", 200
ETHER_METHODS = ("ether", "ether_plus")
RANKED_METHODS = {"lora": 4, "hra": 2, "vera": 256}
"""Methods with a rank, and the rank they have unless another is given."""

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "prodigy")
PRECISIONS = ("no", "fp16", "bf16")


def parse_buckets(text: str) -> tuple[tuple[int, int], ...]:
    """ "height,width;height,width;…" as ((height, width), …), each once.

    Raises:
        ValueError: text of another form.
    """
    if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*;?\s*", text):
        raise ValueError(f"{text!r} is not of the form height,width;height,width")
    pairs = [tuple(int(number) for number in pair.split(",")) for pair in text.split(";") if pair.strip()]
    if any(number < 1 for pair in pairs for number in pair):
        raise ValueError(f"{text!r} holds a side of 0 pixels")
    return tuple(dict.fromkeys((height, width) for height, width in pairs))


def _are_buckets(text: str) -> bool:
    try:
        return bool(parse_buckets(text))
    except ValueError:
        return False


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
class ViewOptions(OptionGroup):
    """how images are cut"""

    resolution: int | None = option(
        "Side of the square training images in pixels. Default: the model's native size.", None, fits=POSITIVE
    )
    aspect_ratio_buckets: str | None = option(
        'Sizes of the training images in place of one square, as "height,width;height,width;…"; each image is cut '
        "to the one whose aspect ratio is nearest to its own.",
        None,
        fits=Fits('sizes as "height,width;height,width"', _are_buckets),
    )
    center_crop: bool = option("Crop at the centre. Default: at a random place.", False)
    random_flip: bool = option("Mirror each image left to right with probability one half.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution is not None and self.aspect_ratio_buckets is not None:
            raise InputError("--resolution: has no effect with --aspect_ratio_buckets; drop one")


@dataclass(frozen=True, kw_only=True)
class InstanceDataOptions(OptionGroup):
    """instance images"""

    instance_prompt: str = option('Prompt that names the subject, such as "a photo of sks dog".', fits=TEXT)
    instance_data_dir: str | None = option(
        "Folder with the images of the subject: JPEG, PNG, WebP, BMP. An image's caption in metadata.jsonl, or in "
        "a .txt file of its name, takes the place of --instance_prompt for it.",
        None,
        fits=TEXT,
        free=True,
    )
    dataset_name: str | None = option(
        "In place of --instance_data_dir: a data set on the Hub or a local folder, as `datasets.load_dataset` takes "
        "it; its split train is used.",
        None,
        fits=TEXT,
        free=True,
    )
    dataset_config_name: str | None = option(
        "Configuration of the data set.", None, fits=TEXT, needs="dataset_name", free=True
    )
    image_column: str = option(
        "Column of the data set with the images.", "image", fits=TEXT, needs="dataset_name", free=True
    )
    caption_column: str | None = option(
        "Column of the data set, or key in metadata.jsonl, with the captions. Default: of a data set none, so that "
        "every image has the instance prompt; in metadata.jsonl text.",
        None,
        fits=TEXT,
        free=True,
    )
    repeats: int = option("How often every image comes in one epoch.", 1, fits=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.instance_data_dir is None) == (self.dataset_name is None):
            arrived = "neither" if self.dataset_name is None else "both"
            raise InputError(f"--instance_data_dir, --dataset_name: got {arrived}, needs one of the two")


@dataclass(frozen=True, kw_only=True)
class PriorOptions(OptionGroup):
    """prior preservation"""

    with_prior_preservation: bool = option(
        "Train on images of the class beside those of the subject, so that the class keeps its looks.", False
    )
    class_data_dir: str | None = option(
        "Folder with images of the class; those that are missing are generated by the base model and kept there.",
        None,
        fits=TEXT,
        needs="with_prior_preservation",
        free=True,
    )
    class_prompt: str | None = option(
        'Prompt of the class images, such as "a photo of a dog".', None, fits=TEXT, needs="with_prior_preservation"
    )
    num_class_images: int = option(
        "Images of the class to train on.", 100, fits=POSITIVE, needs="with_prior_preservation"
    )
    prior_loss_weight: float = option(
        "Weight of the class images' loss.", 1.0, fits=FROM_ZERO, needs="with_prior_preservation"
    )
    sample_batch_size: int = option(
        "Class images that are generated at a time, per process.",
        4,
        fits=POSITIVE,
        needs="with_prior_preservation",
        free=True,
    )
    prior_generation_precision: str | None = option(
        "Precision in which class images are generated. Default: that of the training.",
        None,
        choices=("no", "fp32", "fp16", "bf16"),
        needs="with_prior_preservation",
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("class_data_dir", "class_prompt"):
            if self.with_prior_preservation and getattr(self, name) is None:
                raise InputError(f"--{name}: is missing; --with_prior_preservation needs it")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(OptionGroup):
    """method"""

    method: str | None = option(
        "ether: one reflection per layer. ether_plus: starts at the base model, moves both sides, four times as many "
        "parameters. lora, oft, boft, hra, vera: PEFT's. full: all weights of the denoiser, saved as a pipeline. "
        f"Default: {DEFAULT_METHOD}.",
        None,
        choices=METHODS,
    )
    adapter_config: str | None = option(
        "In place of --method: a JSON file with a PEFT config, as adapter_config.json in a folder that PEFT saved.",
        None,
        fits=TEXT,
        free=True,
    )
    num_blocks: int = option(
        "Blocks per layer of ether and ether_plus; must divide the width of every adapted layer.", 1, fits=POSITIVE
    )
    rank: int | None = option(
        "Rank of the methods that have one. Default: "
        + ", ".join(f"{method} {rank}" for method, rank in RANKED_METHODS.items())
        + ".",
        None,
        fits=POSITIVE,
    )
    target_modules: tuple[str, ...] | None = option(
        "Endings of the names of the denoiser's layers to adapt. Default: the attention projections.",
        None,
        fits=TEXTS,
    )
    train_text_encoder: bool = option("Adapt the text encoders as well.", False)
    text_encoder_target_modules: tuple[str, ...] | None = option(
        "As --target_modules, for the text encoders.", None, fits=TEXTS, needs="train_text_encoder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_config is not None:
            for name in ("method", "rank", "num_blocks"):
                (default,) = (each.default for each in dataclasses.fields(self) if each.name == name)
                if getattr(self, name) != default:
                    raise InputError(f"--{name}: has no effect with --adapter_config; drop one")
            return
        method = self.method_name
        if self.num_blocks != 1 and method not in ETHER_METHODS:
            raise InputError(f"--num_blocks: got {self.num_blocks}, has no effect with --method {method}")
        if self.rank is not None and method not in RANKED_METHODS:
            known = ", ".join(RANKED_METHODS)
            raise InputError(f"--rank: got {self.rank}, has no effect with --method {method}, only with {known}")
        for name in ("target_modules", "text_encoder_target_modules"):
            if method == "full" and getattr(self, name) is not None:
                raise InputError(f"--{name}: has no effect with --method full, which trains every layer")

    @property
    def method_name(self) -> str:
        """The method asked for, else the default; without meaning beside an adapter config."""
        return DEFAULT_METHOD if self.method is None else self.method


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(OptionGroup):
    """optimisation"""

    max_train_steps: int | None = option(
        f"Optimiser steps in all. Default: {DEFAULT_STEPS}, or as many as --num_train_epochs needs.",
        None,
        fits=POSITIVE,
    )
    num_train_epochs: int | None = option(
        "In place of --max_train_steps: how often the training goes through all images.", None, fits=POSITIVE
    )
    train_batch_size: int = option("Images per process and forward pass.", 4, fits=POSITIVE)
    gradient_accumulation_steps: int = option("Forward passes per optimiser step.", 1, fits=POSITIVE)
    learning_rate: float | None = option(
        "Step size of the optimiser. Default by method: "
        + ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
        + f"; with --optimizer prodigy {PRODIGY_LEARNING_RATE:g}.",
        None,
        fits=ABOVE_ZERO,
    )
    text_encoder_lr: float | None = option(
        "Learning rate of the text encoders. Default: --learning_rate.",
        None,
        fits=ABOVE_ZERO,
    )
    scale_lr: bool = option(
        "Multiply the learning rates by accumulation steps, batch size and number of processes.", False
    )
    lr_scheduler: str = option("Course of the learning rate.", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option(
        "Optimiser steps over which the learning rate rises from 0 (every --lr_scheduler but constant).",
        0,
        fits=NOT_NEGATIVE,
    )
    lr_num_cycles: int = option("Restarts of --lr_scheduler cosine_with_restarts.", 1, fits=POSITIVE)
    lr_power: float = option("Power of --lr_scheduler polynomial.", 1.0, fits=ABOVE_ZERO)
    optimizer: str = option("adamw, or prodigy, which finds its step size itself.", "adamw", choices=OPTIMIZERS)
    use_8bit_adam: bool = option(
        "AdamW with moments in 8 bits (bitsandbytes; tensors below 4,096 values keep 32 bits).", False
    )
    adam_beta1: float = option("Decay of the first moment.", 0.9, fits=BELOW_ONE)
    adam_beta2: float = option("Decay of the second moment.", 0.999, fits=BELOW_ONE)
    adam_weight_decay: float = option(
        "Weight decay. Default 0: the length of a hyperplane's normal has no effect on the model, so decay would only "
        "raise the effective learning rate.",
        0.0,
        fits=FROM_ZERO,
    )
    adam_epsilon: float = option("Term that keeps the optimiser's division finite.", 1e-8, fits=ABOVE_ZERO)
    max_grad_norm: float = option("Gradients are clipped to this norm over all that is trained.", 1.0, fits=ABOVE_ZERO)
    snr_gamma: float | None = option(
        "Weigh each timestep's loss by min(SNR, gamma)/SNR, for v targets by min(SNR, gamma)/(SNR + 1) "
        "(arXiv:2303.09556); 5 is usual.",
        None,
        fits=ABOVE_ZERO,
    )
    noise_offset: float = option(
        "Size of a random shift of each channel's noise, which helps dark and bright images; 0.1 is usual.",
        0.0,
        fits=FROM_ZERO,
    )
    use_ema: bool = option(
        "Save and generate the running average of what is trained in place of its last value.", False
    )
    ema_decay: float = option(
        "Largest decay of the average; it rises from 0.1.", 0.999, fits=BELOW_ONE, needs="use_ema"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise InputError("--num_train_epochs: has no effect with --max_train_steps; drop one")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise InputError(
                f"--lr_warmup_steps: got {self.lr_warmup_steps}, has no effect with --lr_scheduler constant; "
                "use constant_with_warmup"
            )
        for name, schedule in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            if getattr(self, name) != 1 and self.lr_scheduler != schedule:
                raise InputError(f"--{name}: has no effect without --lr_scheduler {schedule}")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise InputError(f"--use_8bit_adam: has no effect with --optimizer {self.optimizer}; drop one")

    @property
    def steps(self) -> int:
        """Optimiser steps in all. Raises `ValueError` where they are given as epochs (see `resolve`)."""
        if self.num_train_epochs is not None:
            raise ValueError("num_train_epochs is not resolved to a number of steps")
        return DEFAULT_STEPS if self.max_train_steps is None else self.max_train_steps

    def samples_per_step(self, processes: int) -> int:
        """Images that one optimiser step sees, over all processes."""
        return self.gradient_accumulation_steps * self.train_batch_size * processes

    def resolve(self, *, default_learning_rate: float, epoch_samples: int, processes: int) -> "OptimizationOptions":
        """The same options with the number of steps and the learning rates that they come to.

        Args:
            default_learning_rate: of the method.
            epoch_samples: images in one epoch.
            processes: number of processes.
        """
        per_step = self.samples_per_step(processes)
        steps = self.max_train_steps or DEFAULT_STEPS
        if self.num_train_epochs is not None:
            steps = math.ceil(self.num_train_epochs * epoch_samples / per_step)
        default = PRODIGY_LEARNING_RATE if self.optimizer == "prodigy" else default_learning_rate
        factor = per_step if self.scale_lr else 1
        rate = (default if self.learning_rate is None else self.learning_rate) * factor
        encoder_rate = None if self.text_encoder_lr is None else self.text_encoder_lr * factor
        return dataclasses.replace(
            self,
            max_train_steps=steps,
            num_train_epochs=None,
            learning_rate=rate,
            text_encoder_lr=encoder_rate,
            scale_lr=False,
        )


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions(OptionGroup):
    """speed and memory"""

    mixed_precision: str | None = option(
        "Precision of the frozen weights and of the arithmetic; what is trained stays in float32. Default: as "
        "`accelerate launch` was told, else no.",
        None,
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, slower.", False)
    cache_latents: bool = option(
        "Encode every image (and its mirror image, with --random_flip) once before the training, each repeat with "
        "one crop, and take the autoencoder off the device.",
        False,
    )
    pre_compute_text_embeddings: bool = option(
        "Encode every prompt once before the training and take the text encoders off the device.", False
    )
    offload: bool = option(
        "Keep what is not trained, but for the denoiser, in the CPU's memory whenever it is not at work.",
        False,
        free=True,
    )
    attention_backend: str | None = option(
        "What computes the denoiser's attention, through EtherAttnProcessor. Default: diffusers' own processor.",
        None,
        choices=BACKENDS,
    )
    enable_xformers_memory_efficient_attention: bool = option("The same as --attention_backend xformers.", False)
    allow_tf32: bool = option("TensorFloat-32 for float32 products on Nvidia GPUs from Ampere on.", False)
    compile: bool = option("torch.compile for the denoiser's repeated blocks; the first step takes long.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """sample images"""

    validation_prompt: tuple[str, ...] | None = option(
        "Prompts to generate with base and tuned model. Default: the instance prompt.", None, fits=TEXTS, free=True
    )
    num_validation_images: int = option("Images per prompt; 0 generates none.", 4, fits=NOT_NEGATIVE, free=True)
    validation_steps: int | None = option(
        "Generate after every so many optimiser steps. The end of the training is always generated.",
        None,
        fits=POSITIVE,
        free=True,
    )
    validation_epochs: int | None = option(
        "Generate after every so many epochs, in place of --validation_steps.", None, fits=POSITIVE, free=True
    )
    num_inference_steps: int = option("Denoising steps per image.", 25, fits=POSITIVE, free=True)
    guidance_scale: float = option("Classifier-free guidance of the images.", 7.5, fits=FROM_ZERO, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps is not None and self.validation_epochs is not None:
            raise InputError("--validation_epochs: has no effect with --validation_steps; drop one")
        for name in ("validation_steps", "validation_epochs"):
            if getattr(self, name) is not None and not self.num_validation_images:
                raise InputError(f"--{name}: has no effect with --num_validation_images 0; drop one")


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
        "Folder for the adapter, the model card and the images.", "ether-dreambooth", fits=TEXT, free=True
    )
    seed: int = option("Every random number follows from it; two runs with one seed agree.", 0, fits=NOT_NEGATIVE)
    report_to: str = option(
        "Where to log loss, learning rate, options and sample images.",
        "none",
        choices=("tensorboard", "wandb", "all", "none"),
        free=True,
    )
    logging_dir: str = option("Folder of the logs, inside --output_dir unless absolute.", "logs", fits=TEXT, free=True)
    push_to_hub: bool = option("Upload what the run leaves to the Hub when it is done.", False, free=True)
    hub_model_id: str | None = option(
        "Repository on the Hub. Default: the name of --output_dir, under the user's own name.",
        None,
        fits=TEXT,
        needs="push_to_hub",
        free=True,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every training script can be told. A script adds groups of its own.

    Raises:
        InputError: options of two groups that contradict each other.
    """

    model: ModelOptions
    views: ViewOptions
    adapter: AdapterOptions
    optimization: OptimizationOptions
    performance: PerformanceOptions
    validation: ValidationOptions
    state: StateOptions
    run: RunOptions

    def __post_init__(self) -> None:
        encoders_train = self.adapter.train_text_encoder
        if self.optimization.text_encoder_lr is not None and not encoders_train:
            raise InputError("--text_encoder_lr: has no effect without --train_text_encoder; add it")
        if self.performance.pre_compute_text_embeddings and encoders_train:
            raise InputError(
                "--pre_compute_text_embeddings: contradicts --train_text_encoder, which changes them; drop one"
            )
