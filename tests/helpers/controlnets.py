"""Small pipelines of transformers with ControlNets, so deep that the answers of few blocks are spread over many."""

import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from helpers.flow_zoo import make

from ether_diffusion.control.controlnets import ControlNets, controlnets_for

NAMES = ("flux", "sd3")
DEPTHS = {"flux": {"num_layers": 3, "num_single_layers": 5}, "sd3": {"num_layers": 5}}


def make_deep(name: str, folder) -> DiffusionPipeline:
    """One of the pipelines, whose autoencoder gives distributions without width."""
    pipe = make(name, Path(tempfile.mkdtemp(dir=folder)))
    torch.manual_seed(0)
    config = {**pipe.transformer.config, **DEPTHS[name], "_use_default_values": []}
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    last = pipe.vae.encoder.conv_out
    with torch.no_grad():
        last.weight[len(last.weight) // 2 :] = 0
        last.bias[len(last.bias) // 2 :] = -30
    return pipe


def controlnets_of(pipe: DiffusionPipeline, **layers: int) -> ControlNets:
    """The ControlNets of a pipeline; layers: as the flags say."""
    return controlnets_for(type(pipe).__name__)(pipe.transformer, 2 * pipe.vae_scale_factor, layers)


def drawn(controlnet: ModelMixin, seed: int = 0) -> ModelMixin:
    """A ControlNet without zeros, as training leaves it."""
    torch.manual_seed(seed)
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return controlnet.eval()
