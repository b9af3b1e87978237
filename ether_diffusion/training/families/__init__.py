"""Model families: what training must know about one kind of pipeline, one module each.

The rest of training uses `Family` alone; a new family is a new module and a line in `FAMILIES`.
"""

from diffusers import DiffusionPipeline

from ether_diffusion.errors import InputError
from ether_diffusion.training.families.base import Family
from ether_diffusion.training.families.sdxl import StableDiffusionXL
from ether_diffusion.training.families.source import Blueprint, ModelSource
from ether_diffusion.training.families.stable_diffusion import StableDiffusion

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL)

__all__ = ["FAMILIES", "Blueprint", "Family", "ModelSource", "family_at", "family_of"]


def family_at(source: ModelSource) -> type[Family]:
    """The family of a pipeline that is not loaded yet, from its `model_index.json`.

    Raises:
        InputError: no pipeline there, or one that no family covers.
    """
    return _named(str(source.config().get("_class_name")), source.given)


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline, wrapped around it.

    Raises:
        InputError: no family covers this pipeline.
    """
    return _named(type(pipe).__name__, "pipe")(pipe)


def _named(pipeline_class: str, where: str) -> type[Family]:
    for family in FAMILIES:
        if family.pipeline_class.__name__ == pipeline_class:
            return family
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise InputError(f"{where}: is a {pipeline_class}; training covers {known}")
