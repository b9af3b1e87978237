"""ETHER: finetuning by hyperplane reflections (arXiv:2405.20271), for Diffusers and PEFT.

Importing this package registers ETHER with PEFT and gives every `DiffusionPipeline` its `*_ether_*` methods.
"""

from ether_diffusion.adapters import pipeline as loaders
from ether_diffusion.control.classes import (
    EtherControlChromaPipeline,
    EtherControlFlux2KleinPipeline,
    EtherControlFlux2Pipeline,
    EtherControlFluxPipeline,
    EtherControlKrea2Pipeline,
    EtherControlLumina2Pipeline,
    EtherControlPipeline,
    EtherControlQwenImagePipeline,
    EtherControlSanaPipeline,
    EtherControlStableDiffusion3Pipeline,
    EtherControlXLPipeline,
    EtherControlZImagePipeline,
    control_pipeline_class,
)
from ether_diffusion.control.encoder import ControlEncoder, LatentControlEncoder
from ether_diffusion.control.projection import inject
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.attention import EtherAttnProcessor, disable_ether_attention, enable_ether_attention
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.layer import EtherConv2d, EtherLayer, EtherLinear
from ether_diffusion.tuner.model import EtherModel, register

register()
loaders.install()

__all__ = [
    "ControlEncoder",
    "EtherAttnProcessor",
    "EtherConfig",
    "EtherControlChromaPipeline",
    "EtherControlFlux2KleinPipeline",
    "EtherControlFlux2Pipeline",
    "EtherControlFluxPipeline",
    "EtherControlKrea2Pipeline",
    "EtherControlLumina2Pipeline",
    "EtherControlPipeline",
    "EtherControlQwenImagePipeline",
    "EtherControlSanaPipeline",
    "EtherControlStableDiffusion3Pipeline",
    "EtherControlXLPipeline",
    "EtherControlZImagePipeline",
    "EtherConv2d",
    "EtherFileError",
    "EtherLayer",
    "EtherLinear",
    "EtherModel",
    "LatentControlEncoder",
    "control_pipeline_class",
    "disable_ether_attention",
    "enable_ether_attention",
    "inject",
]
__version__ = "0.1.0"
