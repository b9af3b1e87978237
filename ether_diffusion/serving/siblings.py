"""Other pipelines over the models of one, such as image-to-image beside text-to-image."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline

from ether_diffusion.control.classes import control_pipeline_class
from ether_diffusion.control.pipelines import ControlMixin, over
from ether_diffusion.errors import InputError


def make_sibling(pipe: DiffusionPipeline, kind: Any) -> DiffusionPipeline:
    """A pipeline of another class over the same models, which are left as they are.

    (`from_pipe` casts them, to float32 unless it is told otherwise.)

    Raises:
        InputError: no class of pipelines, or one that needs what this pipeline does not have.
    """
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        what = kind.__name__ if isinstance(kind, type) else f"a {type(kind).__name__}"
        raise InputError(f"pipeline: got {what}; a class of pipelines fits, such as StableDiffusionImg2ImgPipeline")
    if kind is type(pipe):
        return pipe
    modules, _ = DiffusionPipeline._get_signature_keys(kind)
    parameters = inspect.signature(kind.__init__).parameters
    needed = [name for name in modules if parameters[name].default is inspect.Parameter.empty]
    if missing := sorted(set(needed) - set(pipe.components)):
        raise InputError(f"pipeline: a {kind.__name__} needs {', '.join(missing)}, which {type(pipe).__name__} lacks")
    return over(kind, pipe)


def make_control_sibling(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline over the same models that applies control encoders.

    Raises:
        InputError: there is none for this class.
    """
    if isinstance(pipe, ControlMixin):
        return pipe
    try:
        return make_sibling(pipe, control_pipeline_class(type(pipe)))
    except ValueError as error:
        raise InputError(f"control_image: {error}") from error
