"""A recipe: how to train a model on a card of so much memory, computed from its configuration alone.

Memory is added up by part, in bytes:

    weights       parameters · bits / 8, the denoiser's in 16 bits or quantised, all others in 16
    trained       ETHER+'s vectors · 4 · (value, gradient, two averages of AdamW)
    activations   of a transformer by `activations.kept_values`, of a UNet by what a step at full size keeps
    layer         of a quantised denoiser, its largest weight in 16 bits, to which it is brought back
    reserve       1 GB for CUDA's context, workspaces and fragmentation

and that at three moments, of which the largest counts: while prompts are encoded, while images are, and in a step.
Estimates: `--dry_run` of the training tells the parts for the files that are there.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ether_diffusion.errors import InputError
from ether_diffusion.training.activations import TEXT_TOKENS, kept_values
from ether_diffusion.training.families import families
from ether_diffusion.training.families.quantization import BITS
from ether_diffusion.training.full_size import MODELS, FullSize, denoiser_of, full_size
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import dry_run
from ether_diffusion.training.options import AdapterOptions

GIB = 2**30
HALF = 2
"""Bytes of a value in bfloat16."""
RESERVE = 10**9
VALUES_OF_A_VECTOR = 4
"""A trained value, its gradient and two averages of AdamW, 4 bytes each."""
VAE_MAPS, VAE_CHANNELS = 7.1, 128
"""How many maps of the image's size an autoencoder has in memory at once while it encodes, and their channels.

Source: benchmarks/results/memory.json, Stable Diffusion 1.5; of SDXL 5.3."""
STEP_IMAGES = 4
"""Images of an optimiser step, by default."""
STEPS_FOR_AN_IMAGE, LEAST_STEPS = 40, 200
"""As many views of each image as the default's 200 steps give to five."""
SIDES = (768, 512)
"""Smaller sizes to train at, where the model's own needs too much."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of the training decides how much memory it takes."""

    side: int
    batch: int
    checkpointing: bool
    quantize: str | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a model on a card.

    model, hub_id: its short name, and its id on the Hub.
    vram: of the card, in GiB.
    settings: that decide the memory.
    flags: of the training, name -> value; True for a switch.
    parts: part -> bytes, in a step of the training.
    moments: moment -> bytes that are needed then, the reserve included; the largest is the peak.
    reasons: what was chosen -> why, one sentence each.
    """

    model: str
    hub_id: str
    vram: float
    settings: Settings
    flags: Mapping[str, str | int | bool]
    parts: Mapping[str, int]
    moments: Mapping[str, int]
    reasons: Mapping[str, str]

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def command(self) -> str:
        """The command line, over several lines."""
        words = [
            f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
            for name, value in self.flags.items()
        ]
        return " \\\n  ".join(["accelerate launch -m ether_diffusion.training.dreambooth", *words])


def recipe(*, model: str, vram: float, images: int) -> Recipe:
    """How to train a model on a card of `vram` GiB with so many images. Nothing is downloaded or read.

    The first of `choices` that fits: smaller batches before gradient checkpointing, that before a quantised base, and
    that before smaller images.

    Args:
        model: short name, see `full_size.MODELS`, or its id on the Hub.
        vram: memory of the card.
        images: to train on.

    Raises:
        InputError: an unknown model, numbers that cannot be, or a card that is too small; says what fits.
    """
    found = full_size(model)
    if not (math.isfinite(vram) and vram > 0):
        raise InputError(f"--vram: got {vram:g}, needs the gigabytes of a card, above 0")
    if images < 1:
        raise InputError(f"--images: got {images}, needs a whole number from 1")
    least = math.inf
    for settings in choices(found, images):
        moments = moments_of(model, settings)
        least = min(least, max(moments.values()))
        if max(moments.values()) <= vram * GIB:
            return _written(model, found, vram, images, settings, moments)
    fitting = [name for name in MODELS if name != _short(found) and _least(name) <= vram * GIB]
    others = f"these fit: {', '.join(fitting)}" if fitting else "no model does"
    raise InputError(
        f"--vram {vram:g}: {_short(found)} needs {least / GIB:.1f} GiB with all that saves memory; on this card "
        f"{others}"
    )


def choices(model: FullSize, images: int) -> Iterator[Settings]:
    """What to try, the best first."""
    plain = model.bytes_of_a_pixel is None or model.bytes_of_a_pixel[0] is not None
    kinds = [None] if model.is_unet else [None, "int8", "nf4"]
    batches = dict.fromkeys(max(1, min(batch, images)) for batch in (4, 2, 1))
    for side in (model.native_side, *(each for each in SIDES if each < model.native_side)):
        for kind in kinds:
            for batch in batches if plain else ():
                yield Settings(side=side, batch=batch, checkpointing=False, quantize=kind)
            for batch in batches:
                yield Settings(side=side, batch=batch, checkpointing=True, quantize=kind)


def parts_of(name: str, settings: Settings) -> dict[str, int]:
    """Part -> bytes in a step of the training; latents and prompts were encoded before."""
    model, (total, largest) = full_size(name), weights_of(name)
    bits = BITS.get(settings.quantize or "", 8 * HALF)
    parts = {"denoiser": int(total * bits / 8)}
    parts["trained, gradients, optimiser"] = 4 * VALUES_OF_A_VECTOR * trained_count(name)
    if model.bytes_of_a_pixel is None:
        tokens = settings.batch * ((settings.side // model.token_side) ** 2 + TEXT_TOKENS)
        parts["activations"] = HALF * kept_values(denoiser_of(name), tokens, checkpointing=settings.checkpointing)
    else:
        per_pixel = model.bytes_of_a_pixel[settings.checkpointing]
        parts["activations"] = int(per_pixel * settings.batch * settings.side**2)
    if settings.quantize:
        parts["a layer in 16 bits"] = HALF * largest
    return parts


def moments_of(name: str, settings: Settings) -> dict[str, int]:
    """Moment -> bytes that are needed then.

    The text encoders of transformers have left before the autoencoder comes, and that before the denoiser; a UNet is
    there all the time, and `--offload` brings the others in when their turn comes.
    """
    model, parts = full_size(name), parts_of(name, settings)
    beside = parts["denoiser"] if model.is_unet else 0
    encoding = int(VAE_MAPS * VAE_CHANNELS * model.vae_bytes * settings.side**2)
    return {
        "while prompts are encoded": RESERVE + beside + HALF * sum(model.text_encoders),
        "while images are encoded": RESERVE + beside + model.vae_bytes * model.vae + encoding,
        "in a step of the training": RESERVE + sum(parts.values()),
    }


@cache
def weights_of(name: str) -> tuple[int, int]:
    """How many parameters the denoiser of a model has, and how many are in the largest of its weights."""
    counts = [each.numel() for each in denoiser_of(name).parameters()]
    return sum(counts), max(counts)


@cache
def trained_count(name: str) -> int:
    """Values that ETHER+ trains on a model, by the layers that its family adapts."""
    family, options = families()[full_size(name).pipeline], AdapterOptions()
    configs = configs_of(read_method(options), family, options)
    # On a denoiser of its own: the shared one stays as it is.
    return dry_run({family.denoiser: denoiser_of.__wrapped__(name)}, configs)


def _least(name: str) -> int:
    return min(max(moments_of(name, settings).values()) for settings in choices(full_size(name), 1))


def _short(model: FullSize) -> str:
    return next(name for name, each in MODELS.items() if each is model)


def _written(
    name: str, model: FullSize, vram: float, images: int, settings: Settings, moments: Mapping[str, int]
) -> Recipe:
    passes = max(1, STEP_IMAGES // settings.batch)
    steps = max(LEAST_STEPS, STEPS_FOR_AN_IMAGE * images)
    flags: dict[str, str | int | bool] = {
        "pretrained_model_name_or_path": model.hub_id,
        "instance_data_dir": "photos",
        "instance_prompt": "a photo of sks dog",
        "method": "ether_plus",
        "mixed_precision": "bf16",
        "resolution": settings.side,
        "train_batch_size": settings.batch,
        "gradient_accumulation_steps": passes,
        "max_train_steps": steps,
        "cache_latents": True,
        "pre_compute_text_embeddings": True,
    }
    flags |= {"offload": True} if model.is_unet else {}
    flags |= {"gradient_checkpointing": True} if settings.checkpointing else {}
    flags |= {"quantize": settings.quantize} if settings.quantize else {}
    flags |= {"vae_tiling": True} if settings.side > 512 else {}
    flags["output_dir"] = "out/dog"
    return Recipe(
        model=_short(model),
        hub_id=model.hub_id,
        vram=vram,
        settings=settings,
        flags=flags,
        parts=parts_of(name, settings),
        moments=moments,
        reasons=_reasons(name, model, vram, images, settings, steps),
    )


def _reasons(name: str, model: FullSize, vram: float, images: int, settings: Settings, steps: int) -> dict[str, str]:
    def without(**changes: object) -> str:
        other = max(moments_of(name, Settings(**{**vars(settings), **changes})).values())
        fits = "would not fit" if other > vram * GIB else "would fit too"
        return f"{format_bytes(other)} {fits}"

    reasons = {
        "method": f"ETHER+ trains {trained_count(name):,} values and needs no search for a learning rate",
        "mixed_precision": "bf16: the frozen weights in 16 bits, and float32's range, so that no loss is scaled",
        "cache_latents": "text encoders and autoencoder do their work before the training, and leave the card",
        "max_train_steps": f"{steps} steps of {STEP_IMAGES} images: for {images} images",
    }
    if settings.quantize:
        reasons["quantize"] = f"{settings.quantize}: with the base in 16 bits, {without(quantize=None)}"
    if settings.checkpointing:
        sure = model.bytes_of_a_pixel is None or model.bytes_of_a_pixel[0] is not None
        why = f"without it, {without(checkpointing=False)}" if sure else "without it, this model fits no usual card"
        reasons["gradient_checkpointing"] = f"{why}; a step takes about a third longer"
    if settings.batch < min(STEP_IMAGES, images):
        reasons["train_batch_size"] = (
            f"{settings.batch}: with {2 * settings.batch}, {without(batch=2 * settings.batch)}"
        )
    at = f"{settings.side} pixels"
    own = settings.side == model.native_side
    reasons["resolution"] = f"{at}: the model's own" if own else f"{at}: at its own, {without(side=model.native_side)}"
    return reasons
