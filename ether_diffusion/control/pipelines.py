"""Stock pipelines that also hold control encoders."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.control.encoder import CONTROL, ControlEncoder, first_convolution, inject
from ether_diffusion.control.images import Images, control_tensor


@dataclass
class Control:
    """An encoder on a pipeline: its strength, whether it acts, and what the file it came from says of itself."""

    encoder: ControlEncoder
    weight: float = 1.0
    active: bool = True
    said: dict[str, Any] = field(default_factory=dict)


class ControlMixin:
    """A stock pipeline that also holds control encoders, by the names of their adapters.

    An adapter may consist of vectors on the components, of an encoder, or of both. `set_adapters`, `delete_adapters`
    and the `*_ether_*` methods treat the encoder as one more component, "control_encoder". It is none for diffusers:
    `save_pretrained` writes the stock pipeline.
    """

    _stock: type[DiffusionPipeline]
    _image_to_image: type[DiffusionPipeline]

    @property
    def controls(self) -> dict[str, Control]:
        """Adapter name -> its encoder here. (Set up on first use: diffusers reads the signature of `__init__`.)"""
        if "_controls" not in self.__dict__:
            self.__dict__["_controls"] = {}
        return self.__dict__["_controls"]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> DiffusionPipeline:
        """Diffusers' `from_pipe`; adapters are shared with the other pipeline, control encoders too if it has any."""
        new = super().from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, ControlMixin):
            new.__dict__["_controls"] = pipeline.controls
        return new

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

    # Adapters

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

    def add_control(self, adapter_name: str, encoder: ControlEncoder) -> None:
        """Register an encoder, as it is and in use, under the name of an adapter on the components, or of none.

        Raises:
            ValueError: a name that is taken or cannot be one, or an encoder that does not fit.
        """
        if not isinstance(encoder, ControlEncoder):
            raise ValueError(f"add_control: got a {type(encoder).__name__}, needs a ControlEncoder")
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise ValueError(f"adapter_name={adapter_name!r}: a name is a text without a dot")
        if adapter_name in self.controls:
            raise ValueError(f"the adapter {adapter_name!r} has a control encoder already: choose another name")
        if obstacle := self.check_control(encoder):
            raise ValueError(f"add_control: the encoder {obstacle}")
        self.controls[adapter_name] = Control(encoder)

    def _on_components(self, names: Sequence[str]) -> list[str]:
        """Of these adapters, the ones that components carry.

        Raises:
            ValueError: one that neither a component nor an encoder has.
        """
        carried = dict.fromkeys(name for held in super().get_list_adapters().values() for name in held)
        known = carried | dict.fromkeys(self.controls)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(known) or 'none'}")
        return [name for name in names if name in carried]

    def set_adapters(self, adapter_names: Sequence[str] | str, adapter_weights: Any = None) -> None:
        """As on every pipeline; a strength by component may name "control_encoder" too."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not self.controls:
            return super().set_adapters(adapter_names, adapter_weights)
        weights = list(adapter_weights) if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters ({', '.join(names)}), but {len(weights)} weights")
        strengths, others = {}, {}
        for name, weight in zip(names, weights, strict=True):
            by_component = dict(weight) if isinstance(weight, Mapping) else {CONTROL: weight}
            strengths[name] = by_component.pop(CONTROL, None)
            others[name] = by_component if isinstance(weight, Mapping) else weight
        for name, strength in strengths.items():
            if strength is not None and not _is_number(strength):
                raise ValueError(f"adapter_weights: {name}: got {strength!r} for its encoder, needs a finite number")
        on_components = self._on_components(names)
        if on_components:
            super().set_adapters(on_components, [others[name] for name in on_components])
        else:  # which diffusers' own method does not take
            for part in self.components.values():
                for layer in part.modules() if isinstance(part, nn.Module) else ():
                    if isinstance(layer, BaseTunerLayer):
                        layer.set_adapter([])
        for name, control in self.controls.items():
            control.active = name in names
            if control.active:
                control.weight = 1.0 if strengths[name] is None else float(strengths[name])
        return None

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that are active on any component, or as an encoder."""
        encoders = [name for name, control in self.controls.items() if control.active]
        return list(dict.fromkeys([*super().get_active_adapters(), *encoders]))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of every component that has any, and those with an encoder."""
        return super().get_list_adapters() | ({CONTROL: list(self.controls)} if self.controls else {})

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Remove adapters from every component, and their encoders."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not self.controls:
            return super().delete_adapters(adapter_names)
        if on_components := self._on_components(names):
            super().delete_adapters(on_components)
        for name in names:
            self.controls.pop(name, None)
        return None

    def unload_ether_weights(self) -> None:
        """Remove every ETHER adapter and every control encoder."""
        super().unload_ether_weights()
        self.controls.clear()

    def disable_ether(self) -> None:
        """Let every ETHER adapter rest, encoders too, until `enable_ether`."""
        self._set_control(False, super().disable_ether)

    def enable_ether(self) -> None:
        """Let the active ETHER adapters and encoders act again after `disable_ether`."""
        self._set_control(True, super().enable_ether)

    def _set_control(self, enabled: bool, on_components: Callable[[], None]) -> None:
        try:
            on_components()
        except ValueError:
            if not self.controls:  # neither vectors nor encoders
                raise
        self.__dict__["_controls_rest"] = not enabled

    def set_ether_device(self, adapter_names: Sequence[str] | str, device: torch.device | str | int) -> None:
        """Move adapters' vectors and encoders to a device."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not self.controls:
            return super().set_ether_device(adapter_names, device)
        super().set_ether_device(self._on_components(names), device)
        for name in names:
            if name in self.controls:
                self.controls[name].encoder.to(device)
        return None

    # Images

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
        painter = self if image is None else self._sibling()
        call = super().__call__ if image is None else painter
        self._check_arguments(call if image is None else type(painter).__call__, kwargs, image, strength)
        for name, value in (("start", control_guidance_start), ("end", control_guidance_end)):
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"control_guidance_{name}={value!r}: a number from 0 to 1 fits")
        if control_guidance_start >= control_guidance_end:
            raise ValueError(
                f"control_guidance_start={control_guidance_start} is not before control_guidance_end="
                f"{control_guidance_end}"
            )
        scales = self._control_scales(controlnet_conditioning_scale)
        chosen = self._chosen_controls(control_image, scales)
        features = self._control_features(chosen, scales, prompt, image, painter, kwargs)
        if image is not None:
            kwargs |= {"image": image, "strength": 0.8 if strength is None else strength}
        if features is None:
            return call(prompt, **kwargs)
        step = -1

        def features_now() -> Tensor | None:
            nonlocal step
            step += 1  # the UNet is called once in every step
            n = painter.num_timesteps
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
            if not _is_number(value):
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
        return {name: chosen[name] for name in acting} if not self.__dict__.get("_controls_rest") else {}

    def _control_features(
        self,
        chosen: Mapping[str, Images],
        scales: Mapping[str, float],
        prompt: str | list[str] | None,
        image: Any,
        painter: DiffusionPipeline,
        options: Mapping[str, Any],
    ) -> Tensor | None:
        """The sum of all encoders' features: one for all images, or one for each in the order of the latents."""
        if not chosen:
            return None
        height, width = self._image_size(painter, image, options)
        prompts = len(prompt) if isinstance(prompt, list) else 1
        if prompt is None and options.get("prompt_embeds") is not None:
            prompts = len(options["prompt_embeds"])
        total, device = None, self._execution_device
        for name, pictures in chosen.items():
            encoder = self.controls[name].encoder
            config = encoder.config
            hint = control_tensor(
                pictures,
                height=height,
                width=width,
                interpolation=config.interpolation,
                channels=config.conditioning_channels,
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

    def _image_size(self, painter: DiffusionPipeline, image: Any, options: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of what the call will generate, in pixels."""
        factor, latents = self.vae_scale_factor, options.get("latents")
        if image is not None:
            start = painter.image_processor.preprocess(image)
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class EtherControlPipeline(ControlMixin, StableDiffusionPipeline):
    """Stable Diffusion 1 and 2, text-to-image and image-to-image, with light control."""

    _stock = StableDiffusionPipeline
    _image_to_image = StableDiffusionImg2ImgPipeline


class EtherControlXLPipeline(ControlMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL, text-to-image and image-to-image, with light control."""

    _stock = StableDiffusionXLPipeline
    _image_to_image = StableDiffusionXLImg2ImgPipeline
