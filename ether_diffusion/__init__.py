"""ETHER: finetuning by hyperplane reflections (arXiv:2405.20271), for Diffusers and PEFT.

Importing this package registers ETHER with PEFT and gives every `DiffusionPipeline` its `*_ether_*` methods. What
needs diffusers' pipelines and models, which take long to import, is imported when it is first used.
"""

from typing import TYPE_CHECKING

from ether_diffusion.import_messages import without_import_messages
from ether_diffusion.lazy import imported_later

with without_import_messages():
    from ether_diffusion.adapters.plugin import watch
    from ether_diffusion.errors import EtherFileError
    from ether_diffusion.tuner.config import EtherConfig
    from ether_diffusion.tuner.layer import EtherConv2d, EtherLayer, EtherLinear
    from ether_diffusion.tuner.model import EtherModel, register

if TYPE_CHECKING:
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
    from ether_diffusion.tuner.attention import EtherAttnProcessor, disable_ether_attention, enable_ether_attention

register()
watch()

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

_CLASSES = ("control_pipeline_class", *(name for name in __all__ if name.startswith("EtherControl")))
__getattr__, __dir__ = imported_later(
    __name__,
    {
        **dict.fromkeys(_CLASSES, "control.classes"),
        "ControlEncoder": "control.encoder",
        "EtherAttnProcessor": "tuner.attention",
        "LatentControlEncoder": "control.encoder",
        "disable_ether_attention": "tuner.attention",
        "enable_ether_attention": "tuner.attention",
        "inject": "control.projection",
    },
)
