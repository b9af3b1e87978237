"""Model families: what training must know about one kind of pipeline, one module each.

The rest of training uses `Family` alone; a new family is a new module in this folder.
"""

import pkgutil
from importlib import import_module

from diffusers import DiffusionPipeline

from ether_diffusion.control.pipelines import stock_class
from ether_diffusion.errors import InputError
from ether_diffusion.training.families.base import Family
from ether_diffusion.training.families.sdxl import StableDiffusionXL
from ether_diffusion.training.families.source import Blueprint, ModelSource
from ether_diffusion.training.families.stable_diffusion import StableDiffusion

__all__ = [
    "Blueprint",
    "Family",
    "ModelSource",
    "StableDiffusion",
    "StableDiffusionXL",
    "families",
    "family_at",
    "family_of",
    "guidance_argument",
]


def families() -> dict[str, type[Family]]:
    """Name of the pipeline in diffusers -> its family, of all modules in this folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for kind in vars(import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Family) and hasattr(kind, "pipeline_class"):
                found[kind.pipeline_class] = kind
    return found


def family_at(source: ModelSource) -> type[Family]:
    """The family of a pipeline that is not loaded yet, from its `model_index.json`.

    Raises:
        InputError: no pipeline there, or one that no family covers.
    """
    pipeline_class = str(source.config().get("_class_name"))
    for kind in families().values():
        if pipeline_class in getattr(kind, "distilled_classes", ()):
            raise InputError(kind.distilled(source))
    return _named(pipeline_class, source.given)


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline, wrapped around it.

    Raises:
        InputError: no family covers this pipeline.
    """
    return _named(type(pipe).__name__, "pipe")(pipe)


def guidance_argument(pipe: DiffusionPipeline) -> str:
    """What a pipeline of diffusers, or ours over it, calls guidance by the prompt."""
    return getattr(families().get(stock_class(pipe).__name__), "guidance_argument", "guidance_scale")


def _named(pipeline_class: str, where: str) -> type[Family]:
    known = families()
    if pipeline_class not in known:
        raise InputError(f"{where}: is a {pipeline_class}; training covers {', '.join(sorted(known))}")
    return known[pipeline_class]
