"""The pipelines with light control: one class for each stock pipeline that is covered."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline

from ether_diffusion.control.pipelines import ControlMixin


class EtherControlPipeline(ControlMixin, diffusers.StableDiffusionPipeline):
    """Stable Diffusion 1 and 2, text-to-image and image-to-image, with light control."""

    _stock = diffusers.StableDiffusionPipeline
    _image_to_image = diffusers.StableDiffusionImg2ImgPipeline


class EtherControlXLPipeline(ControlMixin, diffusers.StableDiffusionXLPipeline):
    """Stable Diffusion XL, text-to-image and image-to-image, with light control."""

    _stock = diffusers.StableDiffusionXLPipeline
    _image_to_image = diffusers.StableDiffusionXLImg2ImgPipeline


def _with_control(
    stock: type[DiffusionPipeline], image_to_image: type[DiffusionPipeline] | None = None
) -> type[DiffusionPipeline]:
    """A class of a stock pipeline with light control; its name is the stock one's after "EtherControl"."""
    also = " and image-to-image" if image_to_image is not None else ""
    return type(
        f"EtherControl{stock.__name__}",
        (ControlMixin, stock),
        {
            "__module__": __name__,
            "__doc__": f"Diffusers' `{stock.__name__}`, text-to-image{also}, with light control.",
            "_stock": stock,
            "_image_to_image": image_to_image,
        },
    )


EtherControlFluxPipeline = _with_control(diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline)
EtherControlFlux2Pipeline = _with_control(diffusers.Flux2Pipeline)
EtherControlFlux2KleinPipeline = _with_control(diffusers.Flux2KleinPipeline)
EtherControlStableDiffusion3Pipeline = _with_control(
    diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusion3Img2ImgPipeline
)
EtherControlQwenImagePipeline = _with_control(diffusers.QwenImagePipeline, diffusers.QwenImageImg2ImgPipeline)
EtherControlChromaPipeline = _with_control(diffusers.ChromaPipeline, diffusers.ChromaImg2ImgPipeline)
EtherControlZImagePipeline = _with_control(diffusers.ZImagePipeline, diffusers.ZImageImg2ImgPipeline)
EtherControlSanaPipeline = _with_control(diffusers.SanaPipeline)
EtherControlLumina2Pipeline = _with_control(diffusers.Lumina2Pipeline)
EtherControlKrea2Pipeline = _with_control(diffusers.Krea2Pipeline)

CONTROL_PIPELINES: dict[str, type[DiffusionPipeline]] = {
    kind._stock.__name__: kind
    for kind in (
        EtherControlPipeline,
        EtherControlXLPipeline,
        EtherControlFluxPipeline,
        EtherControlFlux2Pipeline,
        EtherControlFlux2KleinPipeline,
        EtherControlStableDiffusion3Pipeline,
        EtherControlQwenImagePipeline,
        EtherControlChromaPipeline,
        EtherControlZImagePipeline,
        EtherControlSanaPipeline,
        EtherControlLumina2Pipeline,
        EtherControlKrea2Pipeline,
    )
}
"""Name of a stock pipeline -> its class with light control."""


def control_pipeline_class(stock: type[DiffusionPipeline] | str) -> type[DiffusionPipeline]:
    """The class with light control of a stock pipeline, or of its name.

    Raises:
        ValueError: there is none; names those that have one.
    """
    name = stock if isinstance(stock, str) else stock.__name__
    if name not in CONTROL_PIPELINES:
        raise ValueError(f"{name}: there is light control for {', '.join(CONTROL_PIPELINES)}")
    return CONTROL_PIPELINES[name]
