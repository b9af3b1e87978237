"""Sample images that show what a training does."""

from dataclasses import dataclass

from ether_diffusion.training.options.base import FROM_ZERO, NOT_NEGATIVE, POSITIVE, OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """sample images"""

    validation_prompt: tuple[str, ...] | None = option(
        "Prompts to generate with base and tuned model. Default: the instance prompt.", None, free=True
    )
    num_validation_images: int = option("Images per prompt; 0 generates none.", 4, fits=NOT_NEGATIVE, free=True)
    validation_steps: int | None = option(
        "Generate after every so many optimiser steps. The end of the training is always generated.",
        None,
        fits=POSITIVE,
        without="num_validation_images 0",
        free=True,
    )
    validation_epochs: int | None = option(
        "Generate after every so many epochs, in place of --validation_steps.",
        None,
        fits=POSITIVE,
        without=("validation_steps", "num_validation_images 0"),
        free=True,
    )
    num_inference_steps: int = option("Denoising steps per image.", 25, fits=POSITIVE, free=True)
    guidance_scale: float = option("Classifier-free guidance of the images.", 7.5, fits=FROM_ZERO, free=True)
