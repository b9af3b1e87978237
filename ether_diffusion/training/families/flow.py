"""What the transformer families share: flow matching, and components that are in memory only while they are needed.

A text encoder of these pipelines can be larger than the transformer. So the pipeline begins without any weights; a
component gets them when it is asked for, and loses them by `offload`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion.errors import InputError
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families.base import Conditioning, Family
from ether_diffusion.training.families.quantization import loading_config, quantize_loaded
from ether_diffusion.training.families.source import Blueprint, ModelSource, parameter_counts
from ether_diffusion.training.latents import LatentSpace, side_factor
from ether_diffusion.training.noise import FlowNoise
from ether_diffusion.training.options import FlowOptions

NEGATIVE = "negative_"
ATTENTION_BACKENDS = {"sdpa": "native", "xformers": "xformers"}
"""What diffusers calls them."""


class FlowFamily(Family):
    """A transformer that predicts the velocity ε − x of flow matching.

    A family of this kind adds `encode_prompts`, whose names are those under which the pipeline takes encoded prompts,
    and `predict`.

    Class attributes:
        patch: latents beside each other, in a row or a column, that make one token.
        native_resolution: side in pixels of the images that the transformer was made for.
        negative_prompt: that the pipeline's guidance steers away from; None where it has no such guidance.
        guidance_argument: of the pipeline.
        unread: the last block's layers on which the answer does not depend, a pattern of their names in the block.

    Attributes:
        guidance: what transformers with an embedding of the guidance are told in training.

    Source: flow matching, arXiv:2210.02747; SD3, arXiv:2403.03206.
    """

    denoiser = "transformer"
    is_flow = True
    trained_text_encoders: ClassVar[Sequence[str]] = ()
    patch: ClassVar[int] = 2
    native_resolution: int = 1024
    negative_prompt: ClassVar[str | None] = ""
    guidance_argument: ClassVar[str] = "guidance_scale"
    unread: ClassVar[str | None] = None

    def __init__(self, pipe: DiffusionPipeline, load: Callable[[str], nn.Module] | None = None):
        self._load, self._skeletons = load, {}
        super().__init__(pipe)
        self.noise, self.guidance = FlowNoise(pipe.scheduler.config), 1.0
        if load is not None:
            self._skeletons = super().modules()
            self.device = torch.device("cpu")

    @classmethod
    def read_blueprint(cls, source: ModelSource) -> Blueprint:
        """The pipeline without weights. Raises `InputError` where training does not cover this pipeline."""
        index = source.config()
        if source.configs is not None:
            raise InputError(f"{source.given}: is one file; a {cls.pipeline_class} is read from a folder or the Hub")
        present = [name for name in cls.text_encoders if is_model(index, name)]
        models = read_models(source, [*present, "vae", cls.denoiser])
        counts, multiple = parameter_counts(models), side_factor(models["vae"]) * cls.patch
        source.check_variant({*models} - ({"vae"} if source.vae else set()))
        adaptable = {name: models[name] for name in (cls.denoiser, *cls.trained_text_encoders)}
        return Blueprint(adaptable, cls.native_resolution, multiple, counts)

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, quantize: str | None = None) -> FlowFamily:
        """The pipeline, each of its components without weights until it is asked for.

        quantize: how the transformer's weights are kept; None in this dtype, as all others.
        """
        index = source.config()
        skeletons = read_models(source, [name for name in index if is_model(index, name)])
        with source.reading():
            pipe = getattr(diffusers, cls.pipeline_class).from_pretrained(
                source.path, revision=source.revision, **skeletons
            )

        def load(name: str) -> nn.Module:
            if name == "vae" and source.vae is not None:
                with source.reading_vae():
                    return type(skeletons[name]).from_pretrained(source.vae, dtype=dtype)
            kind = quantize if name == cls.denoiser else None
            config = loading_config(kind, dtype)
            with source.reading():
                component = type(skeletons[name]).from_pretrained(
                    source.path,
                    subfolder=name,
                    dtype=dtype,
                    revision=source.revision,
                    variant=source.variant,
                    **({} if config is None else {"quantization_config": config}),
                )
            quantize_loaded(component, kind, dtype)
            return component

        return cls(pipe, load)

    @cached_property
    def latents(self) -> LatentSpace:
        return LatentSpace(lambda: self.component("vae"))

    @property
    def pixel_multiple(self) -> int:
        """What a side in pixels is divided by until it is one of the tokens."""
        return self.pipe.vae_scale_factor * self.patch

    def token_count(self, target: Target) -> int:
        return prod(side // self.pixel_multiple for side in target)

    def size_inputs(self, target: Target) -> dict[str, Any]:
        return dict(zip(("height", "width"), target, strict=True))

    # Components -------------------------------------------------------------------------------------------------

    def component(self, name: str) -> nn.Module:
        """The component with its weights, which are read now if need be."""
        component = super().component(name)
        if component is self._skeletons.get(name):
            component = self._load(name).eval().requires_grad_(False)
            component.to("cpu" if name in self._offloaded else self.device)
            setattr(self.pipe, name, component)
        return component

    def modules(self) -> dict[str, nn.Module]:
        """The components that have weights in memory."""
        return {name: each for name, each in super().modules().items() if each is not self._skeletons.get(name)}

    def release(self, *names: str) -> None:
        for name in set(names) & set(self._skeletons):
            setattr(self.pipe, name, self._skeletons[name])
        super().release(*(name for name in names if name not in self._skeletons))

    def offload(self, *names: str) -> None:
        self._offloaded |= set(names)
        super().offload(*(name for name in names if name in self.modules()))

    def complete(self) -> None:
        for name in self.component_names:
            self.component(name)

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        for name in names:
            if isinstance(getattr(self.pipe, name), nn.Module):
                self.component(name)
        with super().on_device(*names):
            yield

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Encode these prompts and the negative one now, and let the text encoders go."""
        negative = [] if self.negative_prompt is None else [self.negative_prompt]
        prompts = [prompt for prompt in [*prompts, *negative] if prompt not in self._kept_prompts]
        if prompts:
            super().keep_prompts(prompts)

    def set_noise(self, options: FlowOptions) -> None:
        """Draw levels, and tell of guidance, as the options say."""
        self.noise = FlowNoise(self.pipe.scheduler.config, options.sampling, options.shift)
        self.guidance = options.guidance

    def set_attention(self, backend: str) -> None:
        self.component(self.denoiser).set_attention_backend(ATTENTION_BACKENDS[backend])

    def freeze_unused(self) -> None:
        if self.unread is None:
            return
        for name, module in self.component(self.denoiser).transformer_blocks[-1].named_modules():
            if re.fullmatch(self.unread, name):
                module.requires_grad_(False)

    # Generating -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], *, pipe: DiffusionPipeline | None = None, **inputs: Any) -> Any:
        """What the pipeline makes of prompts, whose text encoders need not be in memory at the same time."""
        pipe = pipe or self.pipe
        guidance = inputs.pop("guidance_scale", None)
        if guidance is not None:
            inputs[self.guidance_argument] = guidance
        inputs |= self.prompt_inputs(self._encoded(prompts))
        if self.negative_prompt is not None:
            negative = self._encoded([self.negative_prompt] * len(prompts))
            taken = inspect.signature(pipe.__call__).parameters
            given = {f"{NEGATIVE}{name}": value for name, value in self.prompt_inputs(negative).items()}
            inputs |= {name: value for name, value in given.items() if name in taken}
        with self.on_device(self.denoiser, "vae"):
            resting = {name: each for name, each in pipe.components.items() if each is self._skeletons.get(name, self)}
            for name in resting:
                setattr(pipe, name, None)
            try:
                with self.tiling(pipe):
                    return pipe(**inputs)
            finally:
                for name, skeleton in resting.items():
                    setattr(pipe, name, skeleton)

    def _encoded(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Encoded prompts, anew where text encoders are trained."""
        models = self.modules()
        encoders = (models[name] for name in self.text_encoders if name in models)
        if any(each.requires_grad for encoder in encoders for each in encoder.parameters()):
            with torch.no_grad(), self.on_device(*self.text_encoders):
                return self.encode_prompts(prompts)
        self.keep_prompts(prompts)
        return self.conditioning(prompts)

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        """Encoded prompts as the pipeline takes them."""
        return {name: torch.stack([row[name] for row in conditioning]) for name in conditioning[0]}

    def guidance_of(self, noisy: Tensor) -> Tensor | None:
        """What the transformer is told of guidance, for each sample; None where it has no embedding of it."""
        if not getattr(self.component(self.denoiser).config, "guidance_embeds", False):
            return None
        return torch.full((len(noisy),), self.guidance, device=noisy.device)


def is_model(index: Mapping[str, Any], name: str) -> bool:
    """Whether a component of `model_index.json` has weights."""
    kind = _class_of(index, name)
    return kind is not None and issubclass(kind, nn.Module)


def read_models(source: ModelSource, names: Sequence[str]) -> dict[str, nn.Module]:
    """Components of a pipeline on the meta device, by the classes that its `model_index.json` names.

    Raises:
        InputError: one that is not there or cannot be read.
    """
    index, models = source.config(), {}
    for name in names:
        kind = _class_of(index, name)
        if kind is None:
            raise InputError(f"{source.given}: has no {name}")
        if name == "vae" and source.vae is not None:
            with source.reading_vae(), torch.device("meta"):
                models[name] = kind.from_config(kind.load_config(source.vae))
            continue
        with source.reading(), torch.device("meta"):
            if hasattr(kind, "load_config"):
                models[name] = kind.from_config(source.config(name, kind))
            else:
                config = kind.config_class.from_pretrained(**source.config_place, subfolder=name)
                models[name] = kind(config)
    return models


def _class_of(index: Mapping[str, Any], name: str) -> type | None:
    entry = index.get(name)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(each, str) for each in entry):
        return None
    library, kind = entry
    if library not in ("diffusers", "transformers"):
        raise InputError(f"{name} is a {kind} of {library}; training covers pipelines of diffusers' own classes")
    return getattr(importlib.import_module(library), kind, None)
