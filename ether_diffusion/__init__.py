"""ETHER: finetuning by hyperplane reflections (arXiv:2405.20271), for Diffusers and PEFT.

Importing this package registers ETHER with PEFT and gives every `DiffusionPipeline` its `*_ether_*` methods.
"""

from . import loaders
from .attention import EtherAttnProcessor, disable_ether_attention, enable_ether_attention
from .checkpoint import EtherFileError
from .config import EtherConfig
from .control import ControlEncoder, EtherControlPipeline, EtherControlXLPipeline, inject
from .layers import EtherConv2d, EtherLayer, EtherLinear
from .model import EtherModel, register

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
