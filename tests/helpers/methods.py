"""What tests do with methods of training: start one, move what it trains, load what it saved."""

import torch
from diffusers import DiffusionPipeline
from helpers.zoo import quiet

from ether_diffusion.training.families import StableDiffusion
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import add_adapters, trained_parameters
from ether_diffusion.training.methods.saving import loading_code
from ether_diffusion.training.options import AdapterOptions


def options_of(method=None, with_text=False, **more) -> AdapterOptions:
    return AdapterOptions(method=method, train_text_encoder=with_text, **more)


def start(pipe, options, family=StableDiffusion, seed=0):
    """The pipeline with what is to be trained: method, configs, models."""
    method = read_method(options)
    configs = configs_of(method, family, options)
    models = {name: getattr(pipe, name) for name in configs}
    add_adapters(models, configs, seed=seed)
    return method, configs, models


@torch.no_grad()
def perturb(models, configs, size=0.05):
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(models, configs):
        parameter += size * torch.randn(parameter.shape, generator=generator)


def reopen(folder, saved, method, components):
    """A fresh pipeline with what was saved, by the lines that the model card shows."""
    pipe = quiet(DiffusionPipeline.from_pretrained(folder))
    code = loading_code(method, components).replace("{where}", repr(str(saved)))
    exec(code, scope := {"pipe": pipe})
    return quiet(scope["pipe"])


def denoise(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator).to(dtype)
    return unet(sample, 3, encoder_hidden_states=states).sample
