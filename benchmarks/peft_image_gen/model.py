"""FLUX.2 klein as the benchmark uses it: prompts and images are encoded once, then one adapter after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ether_diffusion.errors import InputError
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.families.base import Conditioning, rows
from ether_diffusion.training.families.flux2 import Flux2Klein
from ether_diffusion.training.options import ViewOptions
from peft_image_gen.data import Example
from peft_image_gen.settings import Setting


class BenchmarkKlein(Flux2Klein):
    """FLUX.2 klein with the text of other layers than its pipeline's own, which the published rows were made with."""

    setting: Setting

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        embedded, _ = self.pipe.encode_prompt(
            list(prompts),
            device=self.device,
            max_sequence_length=self.setting.max_sequence_length,
            text_encoder_out_layers=self.setting.text_layers,
        )
        return rows(prompt_embeds=embedded)


@dataclass(frozen=True)
class Prepared:
    """What is trained on, encoded, on the device. latents: (n, c, h, w) in the dtype of the base; seconds: it took."""

    latents: Tensor
    conditioning: list[Conditioning]
    seconds: float


def open_model(source: ModelSource, setting: Setting, device: str) -> BenchmarkKlein:
    """The pipeline, its components without weights until they are needed.

    Raises:
        InputError: another pipeline, a distilled one, or one for which resolution or layers of the text do not fit.
    """
    kind = source.config().get("_class_name")
    if kind != BenchmarkKlein.pipeline_class:
        raise InputError(f"{source.given}: is a {kind}, the benchmark is of a {BenchmarkKlein.pipeline_class}")
    if told := BenchmarkKlein.distilled(source):
        raise InputError(told)
    BenchmarkKlein.read_blueprint(source).targets(ViewOptions(resolution=setting.resolution))
    family = BenchmarkKlein.load(source, setting.torch_dtype)
    layers, last = family.pipe.text_encoder.config.num_hidden_layers, max(setting.text_layers)
    if last > layers:
        raise InputError(f"{source.given}: its text encoder has {layers} layers, the text is to be that of {last}")
    family.setting = setting
    family.pipe.set_progress_bar_config(disable=True)
    family.freeze(torch.device(device), offloaded=("vae", "text_encoder"))
    return family


def prepare(family: BenchmarkKlein, trained: Sequence[Example], tested: Sequence[Example]) -> Prepared:
    """Encode all prompts of a row and the images that are trained on; the text encoder leaves the memory."""
    started, setting = time.perf_counter(), family.setting
    prompts = [each.prompt for each in trained]
    family.keep_prompts([*prompts, *(each.prompt for each in tested), *setting.drift_prompts])
    with torch.no_grad(), family.on_device("vae"):
        encoded = [family.latents.encode(each.pixels(setting.resolution)) for each in trained]
        latents = torch.stack([family.latents.draw(each, None) for each in encoded])
    latents = latents.to(family.device, setting.torch_dtype)
    return Prepared(latents, family.conditioning(prompts), time.perf_counter() - started)
