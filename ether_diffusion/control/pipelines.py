"""Stock pipelines that also hold control encoders: what they do beyond the stock ones. The classes: `classes.py`."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion.control.encoder import AnyEncoder
from ether_diffusion.control.images import Images, control_tensor
from ether_diffusion.control.projection import FirstProjection, first_projection, inject
from ether_diffusion.latents import LatentSpace, latents_factor


@dataclass
class Control:
    """A control encoder on a pipeline.

    weight: what its features are multiplied by (`set_adapters`).
    active: whether `set_adapters` named its adapter. enabled: False between `disable_ether` and `enable_ether`.
    """

    encoder: AnyEncoder
    weight: float = 1.0
    active: bool = True
    enabled: bool = True


class ControlMixin:
    """A stock pipeline that also applies control encoders, by the names of their adapters.

    An adapter may consist of vectors on the components, of an encoder, or of both. `set_adapters`, `delete_adapters`,
    `add_control` and the `*_ether_*` methods, which every pipeline has, treat the encoder as one more component,
    "control_encoder". It is none for diffusers: `save_pretrained` writes the stock pipeline.
    """

    _stock: type[DiffusionPipeline]
    _image_to_image: type[DiffusionPipeline] | None

    @property
    def controls(self) -> dict[str, Control]:
        """Adapter name -> its encoder here."""
        records = self.ether_adapters  # the rooms above give it to every pipeline
        return {name: record.control for name, record in records.items() if record.control is not None}

    def to_json_string(self) -> str:
        """The index of components, under the stock pipeline's name: diffusers alone can open what is saved."""
        return (
            json.dumps(json.loads(super().to_json_string()) | {"_class_name": self._stock.__name__}, indent=2) + "\n"
        )

    def to(self, *args, **kwargs) -> DiffusionPipeline:
        """Diffusers' `to`; the encoders follow."""
        super().to(*args, **kwargs)
        cast = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
        for control in self.controls.values():
            if self.device.type != "meta":
                control.encoder.to(self.device)
            if cast:
                control.encoder.to(self._denoiser.dtype)
        return self

    @property
    def _denoiser(self) -> nn.Module:
        return getattr(self, denoiser_name(self))

    @property
    def _latents_factor(self) -> int:
        """Pixels of a side that become one of the latents."""
        return self.vae_scale_factor if first_projection(self._denoiser).is_unet else latents_factor(self.vae)

    @property
    def _token_side(self) -> int:
        """Pixels of a side that become one position after the first projection."""
        return self._latents_factor * first_projection(self._denoiser).layout.patch

    def check_control(self, encoder: AnyEncoder) -> str | None:
        """What keeps an encoder from fitting this pipeline, in words, or None."""
        projection, config = first_projection(self._denoiser), encoder.config
        if config.out_channels != projection.width:
            return f"makes {config.out_channels} channels, but the denoiser's first projection here {projection.width}"
        if encoder.takes_latents:
            return _misfit(encoder, projection)
        if encoder.factor != self._token_side:
            what = "autoencoder" if projection.is_unet else "autoencoder and the patches"
            return f"makes a side {encoder.factor} times smaller, but the {what} here {self._token_side} times"
        return None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        control_image: Images | Mapping[str, Images] | None = None,
        image: Any = None,
        strength: float | None = None,
        controlnet_conditioning_scale: float | Mapping[str, float] = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        **kwargs,
    ) -> Any:
        """Generate from text, or from text and an image, under the control of other images.

        Args:
            prompt: one, or several.
            control_image: one image for all prompts, or a list of one for each: PIL of any mode, or arrays and
                tensors in [0, 1]; of any size. With several active encoders, adapter name -> such. None: no control.
            image: start from this image (image-to-image); of pipelines that take reference images, those.
            strength: how far from it, up to 1; default 0.8.
            controlnet_conditioning_scale: multiplies the features, for all encoders or by adapter name; on top of
                the adapter's own weight (`set_adapters`).
            control_guidance_start, control_guidance_end: the part of the steps that the control acts in; step i of n
                does where i / n is not before the start and (i + 1) / n not after the end. A step may consist of
                several calls of the denoiser.
            kwargs: whatever the stock pipeline takes.

        Returns:
            what the stock pipeline returns.

        Raises:
            ValueError: an argument that cannot be used, or that nothing here knows; says what fits.
        """
        references = image is not None and self._takes_references
        if references:
            kwargs, image = {**kwargs, "image": image}, None
        pipeline = self if image is None else self._sibling()
        call = super().__call__ if image is None else pipeline
        self._check_arguments(call if image is None else type(pipeline).__call__, kwargs, image, strength)
        for name, value in (("start", control_guidance_start), ("end", control_guidance_end)):
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"control_guidance_{name}={value!r}: a number from 0 to 1 fits")
        if control_guidance_start >= control_guidance_end:
            raise ValueError(
                f"control_guidance_start={control_guidance_start} is not before control_guidance_end="
                f"{control_guidance_end}"
            )
        scales = self._control_scales(controlnet_conditioning_scale)
        chosen = self._chosen_controls(control_image, scales)
        features = self._control_features(chosen, scales, prompt, image, pipeline, kwargs)
        if image is not None:
            kwargs |= {"image": image, "strength": 0.8 if strength is None else strength}
        if features is None:
            return call(prompt=prompt, **kwargs)
        number = _step_counter(pipeline, first_projection(self._denoiser))

        def features_now() -> Tensor | None:
            step, n = number(), pipeline.num_timesteps
            return features if step / n >= control_guidance_start and (step + 1) / n <= control_guidance_end else None

        with inject(self._denoiser, features_now, references=references):
            return call(prompt=prompt, **kwargs)

    @property
    def _takes_references(self) -> bool:
        """Whether `image` are the stock pipeline's own reference images."""
        return "image" in inspect.signature(self._stock.__call__).parameters

    def _sibling(self) -> DiffusionPipeline:
        """The stock image-to-image pipeline over the same components."""
        if self._image_to_image is None:
            raise ValueError(f"image: there is no image-to-image pipeline for a {self._stock.__name__}; leave it out")
        return over(self._image_to_image, self)

    def _check_arguments(self, call: Callable, given: Mapping, image: Any, strength: float | None) -> None:
        """Stock calls ignore what they do not know; here that is an error."""
        known = {name for name, p in inspect.signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD}
        if unknown := sorted(set(given) - known - {"callback", "callback_steps"}):
            what = "image-to-image" if image is not None else "text-to-image"
            raise ValueError(
                f"{', '.join(unknown)}: {what} takes no such argument; it takes {', '.join(sorted(known))}"
            )
        if image is None and strength is not None:
            fits = "this pipeline takes reference images" if self._takes_references else "add it"
            raise ValueError(f"strength={strength} has no effect without image; {fits}")

    def _control_scales(self, scale: float | Mapping[str, float]) -> dict[str, float]:
        """For every active encoder, what its features are multiplied by."""
        by_name = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(self.controls, scale)
        if unknown := sorted(set(by_name) - set(self.controls)):
            raise ValueError(
                f"controlnet_conditioning_scale: there is no control encoder {', '.join(unknown)}; loaded are "
                f"{', '.join(self.controls) or 'none'}"
            )
        for value in by_name.values() if isinstance(scale, Mapping) else [scale]:
            if not is_number(value):
                raise ValueError(f"controlnet_conditioning_scale={scale!r}: finite numbers fit")
        return {n: by_name.get(n, 1.0) * c.weight for n, c in self.controls.items() if c.active}

    def _chosen_controls(self, control_image: Any, scales: Mapping[str, float]) -> dict[str, Images]:
        """Adapter name -> its control image, for the encoders that act in a call."""
        if control_image is None:
            return {}
        active = ", ".join(scales) or "none"
        if not self.controls:
            raise ValueError(
                "control_image: this pipeline holds no control encoder: load_ether_weights a file with one, or "
                "add_control"
            )
        if not scales:
            raise ValueError(
                f"control_image: no control encoder is active; loaded are {', '.join(self.controls)}: set_adapters"
            )
        if isinstance(control_image, Mapping):
            if unknown := sorted(set(control_image) - set(scales)):
                raise ValueError(
                    f"control_image: {', '.join(unknown)} is no active control encoder; active are {active}"
                )
            chosen = dict(control_image)
        elif len(scales) > 1:
            raise ValueError(f"several control encoders are active ({active}): pass control_image as name -> image")
        else:
            chosen = dict.fromkeys(scales, control_image)
        acting = [name for name, scale in scales.items() if scale]
        if missing := [name for name in acting if chosen.get(name) is None]:
            raise ValueError(
                f"control_image: {', '.join(missing)} is active, but has no image; active are {active}: pass one, "
                "or set_adapters without it"
            )
        return {name: chosen[name] for name in acting if self.controls[name].enabled}

    def _control_features(
        self,
        chosen: Mapping[str, Images],
        scales: Mapping[str, float],
        prompt: str | list[str] | None,
        image: Any,
        pipeline: DiffusionPipeline,
        options: Mapping[str, Any],
    ) -> Tensor | None:
        """The sum of all encoders' features: one for all images, or one for each in the order of the latents."""
        if not chosen:
            return None
        height, width = self._image_size(pipeline, image, options)
        prompts = len(prompt) if isinstance(prompt, list) else 1
        if prompt is None and options.get("prompt_embeds") is not None:
            prompts = len(options["prompt_embeds"])
        total, device, space = None, self._execution_device, None
        for name, images in chosen.items():
            encoder = self.controls[name].encoder
            config = encoder.config
            hint = control_tensor(
                images,
                height=height,
                width=width,
                interpolation=config.interpolation,
                channels=config.get("conditioning_channels", 3),
                value_range=config.value_range,
            )
            if len(hint) not in (1, prompts):
                raise ValueError(
                    f"control_image: got {len(hint)} images for {prompts} prompts; one, or one for each prompt, fits"
                )
            if encoder.takes_latents:
                space = space or LatentSpace(lambda: self.vae)
                hint = latents_of(space, hint, device)
            home = encoder.device
            try:  # an offloaded pipeline computes elsewhere than it waits
                features = encoder.to(device)(hint.to(device)) * scales[name]
            finally:
                encoder.to(home)
            total = features if total is None else total + features
        copies = options.get("num_images_per_prompt") or 1
        return total if len(total) == 1 else total.repeat_interleave(copies, dim=0)

    def _image_size(self, pipeline: DiffusionPipeline, image: Any, options: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of what the call will generate, in pixels."""
        factor, latents = self._latents_factor, options.get("latents")
        multiple, known = self._token_side, inspect.signature(self._stock.__call__).parameters
        if "use_resolution_binning" in known and options.get("use_resolution_binning", True):
            raise ValueError("use_resolution_binning: control is for images of the size that is asked for; pass False")
        if image is not None and "height" not in inspect.signature(type(pipeline).__call__).parameters:
            start = pipeline.image_processor.preprocess(image)
            scale = factor if start.shape[1] == self.vae.config.latent_channels else 1
            return start.shape[-2] * scale, start.shape[-1] * scale
        if latents is not None and latents.ndim == 4 and image is None:  # three axes: tokens, which have no shape
            return latents.shape[-2] * factor, latents.shape[-1] * factor
        sides = native_sides(pipeline)
        height, width = (options.get(name) or own for name, own in zip(("height", "width"), sides, strict=True))
        if height % multiple or width % multiple:
            raise ValueError(f"height={height}, width={width}: multiples of {multiple} fit")
        return height, width


def is_number(value: Any) -> bool:
    """Whether a strength or factor can be one: a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Name of the component that removes noise."""
    return "transformer" if getattr(pipe, "transformer", None) is not None else "unet"


def stock_class(pipe: DiffusionPipeline) -> type[DiffusionPipeline]:
    """The class of a pipeline in diffusers, whose call states the arguments; ours take them, too."""
    return getattr(pipe, "_stock", type(pipe))


def native_sides(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Height and width of the images of a pipeline whose size is not asked for."""
    if denoiser_name(pipe) == "unet":
        side = pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    stated = inspect.signature(stock_class(pipe).__call__).parameters["height"].default
    side = stated or getattr(pipe, "default_sample_size", 0) * pipe.vae_scale_factor or 1024  # Z-Image has no other
    return side, side


def over(kind: type[DiffusionPipeline], pipe: DiffusionPipeline, **more: nn.Module) -> DiffusionPipeline:
    """A pipeline of another class over the components of one, as they are and where they are, and more components.

    Diffusers' `from_pipe` would cast them all to one dtype.
    """
    modules, options = DiffusionPipeline._get_signature_keys(kind)
    config = {name: pipe.config[name] for name in options if name in pipe.config}
    if "add_watermarker" in options:
        config["add_watermarker"] = pipe.watermark is not None
    parts = {name: part for name, part in pipe.components.items() if name in modules} | more
    made = kind(**parts, **config)
    if (origin := pipe.config.get("_name_or_path")) is not None:  # which files tell of
        made.register_to_config(_name_or_path=origin)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def latents_of(space: LatentSpace, images: Tensor, device: torch.device | None = None) -> Tensor:
    """Latents (b, c, h, w) of control images (b, 3, height, width) from 0 to 1: the modes of their distributions."""
    statistics = [space.encode(2 * image - 1, device) for image in images]  # one by one, as in training
    return torch.stack([space.draw(each, None) for each in statistics])


def _misfit(encoder: AnyEncoder, projection: FirstProjection) -> str | None:
    """What keeps an encoder of latents from fitting a first projection, in words, or None."""
    if projection.is_unet:
        return "takes latents, but the denoiser here is a UNet"
    config, layout = encoder.config, projection.layout
    given = (config.in_channels, config.patch_size, bool(config.channels_last))
    here = (projection.channels, layout.patch, layout.channels_last)
    if given == here:
        return None
    words = "{} channels in patches of {}, channels last: {}"
    return f"takes latents of {words.format(*given)}; here they have {words.format(*here)}"


def _step_counter(pipeline: DiffusionPipeline, projection: FirstProjection) -> Callable[[], int]:
    """What tells, in every call of the denoiser, which step it belongs to, from 0.

    A UNet is called once in every step. A transformer is called twice where guidance has a call of its own; there the
    scheduler knows the step. Its number is absent before the first one, and counts from where image-to-image begins.
    """
    if projection.is_unet:
        return itertools.count().__next__

    def number() -> int:
        begin = pipeline.scheduler.begin_index or 0
        index = pipeline.scheduler.step_index
        return 0 if index is None else index - begin

    return number
