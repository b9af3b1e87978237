"""The benchmark's two figures: how like the test images are to what was photographed, and how far others moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from PIL import Image

from ether_diffusion import metrics
from ether_diffusion.metrics import ImageFeatures
from peft_image_gen.data import Example
from peft_image_gen.model import BenchmarkKlein

TEST_SEED, DRIFT_SEED = 100_000, 100_000_000
"""Added to the seed of the training."""


def generate(family: BenchmarkKlein, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """An image of each prompt, one after the other from one generator."""
    setting = family.setting
    generator = torch.Generator(family.device).manual_seed(setting.seed + seed)
    made = []
    for prompt in prompts:
        made += family.generate(
            [prompt],
            num_inference_steps=setting.num_inference_steps,
            guidance_scale=setting.guidance_scale,
            height=setting.resolution,
            width=setting.resolution,
            generator=generator,
        ).images
    return made


def similarity(
    family: BenchmarkKlein, tested: Sequence[Example], features: ImageFeatures
) -> tuple[float, list[Image.Image]]:
    """Mean cosine of each generated image x with the image r of its prompt, 1/n Σ_k f(x_k)·f(r_k); and the images."""
    tested = list(tested) * family.setting.repeats
    images = generate(family, [each.prompt for each in tested], TEST_SEED)
    # The metric's name is for another use of the same sum: 1 less the mean of the paired cosines.
    return 1 - metrics.drift(images, [each.image for each in tested], features), images


def drift(family: BenchmarkKlein, model: PeftModel, features: ImageFeatures) -> float:
    """Mean of (1 − f(x_k)·f(b_k))/2 over prompts without the subject, x with the adapter and b without: 0 to 1."""
    prompts = family.setting.drift_prompts
    with model.disable_adapter():
        before = generate(family, prompts, DRIFT_SEED)
    return metrics.drift(generate(family, prompts, DRIFT_SEED), before, features) / 2
