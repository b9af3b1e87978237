"""Stock pipelines that also hold control encoders."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from ether_diffusion.control.encoder import ControlEncoder, first_convolution, inject
from ether_diffusion.control.images import Images, control_tensor


@dataclass
class Control:
    """A control encoder on a pipeline.

    weight: what its features are multiplied by (`set_adapters`).
    active: whether `set_adapters` named its adapter. enabled: False between `disable_ether` and `enable_ether`.
    """

    encoder: ControlEncoder
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
    _image_to_image: type[DiffusionPipeline]

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
                control.encoder.to(self.unet.dtype)
        return self

    def check_control(self, encoder: ControlEncoder) -> str | None:
        """What keeps an encoder from fitting this pipeline, in words, or None."""
        wide = first_convolution(self.unet).out_channels
        if encoder.config.out_channels != wide:
            return f"makes {encoder.config.out_channels} channels, but the UNet's first convolution here {wide}"
        if encoder.factor != self.vae_scale_factor:
            return (
                f"makes a side {encoder.factor} times smaller, but the autoencoder here {self.vae_scale_factor} times"
            )
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
            image: start from this image (image-to-image).
            strength: how far from it, up to 1; default 0.8.
            controlnet_conditioning_scale: multiplies the features, for all encoders or by adapter name; on top of
                the adapter's own weight (`set_adapters`).
            control_guidance_start, control_guidance_end: the part of the steps that the control acts in; step i of n
                does where i / n is not before the start and (i + 1) / n not after the end.
            kwargs: whatever the stock pipeline takes.

        Returns:
            what the stock pipeline returns.

        Raises:
            ValueError: an argument that cannot be used, or that nothing here knows; says what fits.
        """
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
            return call(prompt, **kwargs)
        step = -1

        def features_now() -> Tensor | None:
            nonlocal step
            step += 1  # the UNet is called once in every step
            n = pipeline.num_timesteps
            return features if step / n >= control_guidance_start and (step + 1) / n <= control_guidance_end else None

        with inject(self.unet, features_now):
            return call(prompt, **kwargs)

    def _sibling(self) -> DiffusionPipeline:
        """The stock image-to-image pipeline over the same components."""
        modules, options = DiffusionPipeline._get_signature_keys(self._image_to_image)
        config = {name: self.config[name] for name in options if name in self.config}
        if "add_watermarker" in options:
            config["add_watermarker"] = self.watermark is not None
        parts = {name: part for name, part in self.components.items() if name in modules}
        sibling = self._image_to_image(**parts, **config)
        sibling.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return sibling

    def _check_arguments(self, call: Callable, given: Mapping, image: Any, strength: float | None) -> None:
        """Stock calls ignore what they do not know; here that is an error."""
        known = {name for name, p in inspect.signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD}
        if unknown := sorted(set(given) - known - {"callback", "callback_steps"}):
            what = "image-to-image" if image is not None else "text-to-image"
            raise ValueError(
                f"{', '.join(unknown)}: {what} takes no such argument; it takes {', '.join(sorted(known))}"
            )
        if image is None and strength is not None:
            raise ValueError(f"strength={strength} has no effect without image; add it")

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
        total, device = None, self._execution_device
        for name, images in chosen.items():
            encoder = self.controls[name].encoder
            config = encoder.config
            hint = control_tensor(
                images,
                height=height,
                width=width,
                interpolation=config.interpolation,
                channels=config.conditioning_channels,
                value_range=config.value_range,
            )
            if len(hint) not in (1, prompts):
                raise ValueError(
                    f"control_image: got {len(hint)} images for {prompts} prompts; one, or one for each prompt, fits"
                )
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
        factor, latents = self.vae_scale_factor, options.get("latents")
        if image is not None:
            start = pipeline.image_processor.preprocess(image)
            scale = factor if start.shape[1] == self.vae.config.latent_channels else 1
            return start.shape[-2] * scale, start.shape[-1] * scale
        if latents is not None:
            return latents.shape[-2] * factor, latents.shape[-1] * factor
        side = self.unet.config.sample_size
        sides = (side, side) if isinstance(side, int) else side
        height, width = (
            options.get(name) or own * factor for name, own in zip(("height", "width"), sides, strict=True)
        )
        if height % factor or width % factor:
            raise ValueError(f"height={height}, width={width}: multiples of {factor} fit")
        return height, width


def is_number(value: Any) -> bool:
    """Whether a strength or factor can be one: a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class EtherControlPipeline(ControlMixin, StableDiffusionPipeline):
    """Stable Diffusion 1 and 2, text-to-image and image-to-image, with light control."""

    _stock = StableDiffusionPipeline
    _image_to_image = StableDiffusionImg2ImgPipeline


class EtherControlXLPipeline(ControlMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL, text-to-image and image-to-image, with light control."""

    _stock = StableDiffusionXLPipeline
    _image_to_image = StableDiffusionXLImg2ImgPipeline
