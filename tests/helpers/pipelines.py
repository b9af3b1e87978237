"""What tests do with pipelines: open, adapt, generate, and compare with what was there before."""

import copy

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from ether_diffusion import EtherConfig
from ether_diffusion.images import find_images
from ether_diffusion.training.data import TrainingImages, examples_of

ONE_GREY_LEVEL = 1 / 255


def generate(pipe, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=3, generator=generator, output_type="np", **options).images[0]


def open_pipeline(folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def training_images(folder, prompt="a photo of sks toy", *, side=16, **options) -> TrainingImages:
    """The images of a folder as square training views."""
    return TrainingImages(examples_of(find_images(folder), prompt), targets=[(side, side)], **options)


def adapt(pipe, method="ether", seed=1, name="default", **fields):
    torch.manual_seed(seed)
    for model in (pipe.unet, pipe.text_encoder):
        model.add_adapter(EtherConfig(method=method, init_weights=False, **fields), adapter_name=name)
    return pipe


def snapshot(pipe) -> dict:
    return {
        name: (
            [(n, type(m)) for n, m in model.named_modules()],
            set(model.__dict__),
            copy.deepcopy(model.state_dict()),
        )
        for name, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder))
    }


def assert_unchanged(pipe, before: dict) -> None:
    for name, (modules, attributes, weights) in snapshot(pipe).items():
        assert (modules, attributes) == before[name][:2]
        assert weights.keys() == before[name][2].keys()
        assert all(torch.equal(v, before[name][2][k]) for k, v in weights.items())


class TwinPipeline(DiffusionPipeline):
    """A pipeline without diffusers' LoRA methods, with two components of one architecture."""

    def __init__(self, unet, unet_2):
        super().__init__()
        self.register_modules(unet=unet, unet_2=unet_2)
