"""ETHER: finetuning by hyperplane reflections (arXiv:2405.20271), for Diffusers and PEFT.

Importing this package registers ETHER with PEFT and gives every `DiffusionPipeline` its `*_ether_*` methods.
"""

from ether_diffusion.adapters import pipeline as loaders
from ether_diffusion.control.encoder import ControlEncoder, inject
from ether_diffusion.control.pipelines import EtherControlPipeline, EtherControlXLPipeline
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
    "EtherControlPipeline",
    "EtherControlXLPipeline",
    "EtherConv2d",
    "EtherFileError",
    "EtherLayer",
    "EtherLinear",
    "EtherModel",
    "disable_ether_attention",
    "enable_ether_attention",
    "inject",
]
__version__ = "0.1.0"
