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
from transformers.utils import is_torchvision_available

from ether_diffusion.base_models import absent_components
from ether_diffusion.control.pipelines import stock_class
from ether_diffusion.errors import InputError
from ether_diffusion.images import some, to_pixels, to_rgb
from ether_diffusion.latents import LatentSpace, side_factor
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families.base import Conditioning, Family
from ether_diffusion.training.families.quantization import loading_config, quantize_loaded
from ether_diffusion.training.families.source import Blueprint, ModelSource, parameter_counts
from ether_diffusion.training.noise import FlowNoise
from ether_diffusion.training.options import FlowOptions

NEGATIVE = "negative_"
ATTENTION_BACKENDS = {"sdpa": "native", "xformers": "xformers"}
"""What diffusers calls them."""


class FlowFamily(Family):
    """A transformer that predicts the velocity ε − x of flow matching.

    A family of this kind adds `encode_prompts`, whose names are those under which the pipeline takes encoded prompts,
    and `predict`. Both take reference images where the pipeline is an editor: `encode_prompts` those of each prompt as
    pixels, if the text encoder sees them, and `predict` batches of their latents.

    Class attributes:
        patch: latents beside each other, in a row or a column, that make one token.
        native_resolution: side in pixels of the images that the transformer was made for.
        negative_prompt: that the pipeline's guidance steers away from; None where it has no such guidance.
        guidance_argument: of the pipeline.
        distilled_classes: pipelines of distilled models of this architecture, which training does not cover.
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
    distilled_classes: ClassVar[Sequence[str]] = ()
    unread: ClassVar[str | None] = None

    def __init__(self, pipe: DiffusionPipeline, load: Callable[[str], nn.Module] | None = None):
        self._load, self._skeletons = load, {}
        super().__init__(pipe)
        self.noise, self.guidance = FlowNoise(pipe.scheduler.config), 1.0
        self.native_resolution = self.native_side(pipe.components)
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
        for name in present:
            _check_tokenizer(source, index, name.replace("text_encoder", "tokenizer"))
        adaptable = {name: models[name] for name in (cls.denoiser, *cls.trained_text_encoders)}
        positions = getattr(models[cls.denoiser].config, "pos_embed_max_size", None)
        largest = None if positions is None else positions * multiple
        return Blueprint(adaptable, cls.native_side(models), multiple, counts, largest)

    @classmethod
    def native_side(cls, models: Mapping[str, nn.Module]) -> int:
        """Side in pixels of the images that the transformer was made for; models: the components, without weights."""
        return cls.native_resolution

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, quantize: str | None = None) -> FlowFamily:
        """The pipeline, each of its components without weights until it is asked for.

        quantize: how the transformer's weights are kept; None in this dtype, as all others.
        """
        index = source.config()
        skeletons = read_models(source, [name for name in index if is_model(index, name)])
        with source.reading():
            pipe = getattr(diffusers, cls.pipeline_class).from_pretrained(
                source.path, revision=source.revision, **absent_components(index), **skeletons
            )

        def load(name: str) -> nn.Module:
            if name == "vae" and source.vae is not None:
                with source.reading_vae():
                    return type(skeletons[name]).from_pretrained(source.vae, dtype=dtype)
            kind = quantize if name == cls.denoiser else None
            config = loading_config(kind, dtype)
            with source.reading():
                component, found = type(skeletons[name]).from_pretrained(
                    source.path,
                    subfolder=name,
                    dtype=dtype,
                    revision=source.revision,
                    variant=source.variant,
                    output_loading_info=True,
                    **({} if config is None else {"quantization_config": config}),
                )
                if missing := sorted(found["missing_keys"]):
                    raise ValueError(f"its {name} lacks weights that its config asks for: {some(missing)}")
            quantize_loaded(component, kind, dtype)
            return component

        return cls(pipe, load)

    @classmethod
    def distilled(cls, source: ModelSource) -> str | None:
        """One sentence that names the model to train on instead, where this one is distilled; None where it is not."""
        base = cls.base_of(source)
        if base is None:
            return None
        return f"{source.given}: is distilled to generate in few steps, which training takes from it; train on {base}"

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        """Hub id of the model that a distilled one was made from; None where this one is not distilled."""
        return None

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

    def encode_negative(self, references: Sequence[Tensor] = ()) -> Conditioning:
        """The prompt that guidance steers away from; for pipelines that encode it otherwise than the others."""
        return super()._encode(self.negative_prompt, references)

    def _encode(self, prompt: str | None, references: Sequence[Tensor]) -> Conditioning:
        return self.encode_negative(references) if prompt is None else super()._encode(prompt, references)

    def keep_prompts(
        self, prompts: Sequence[str | None], references: Sequence[Sequence[Tensor]] | None = None
    ) -> None:
        """Encode these prompts and the negative one now, and let the text encoders go."""
        negative = [] if self.negative_prompt is None else [None] * (1 if references is None else len(references))
        if references is not None:  # the negative prompt is another one beside each of them
            references = [*references, *references[: len(negative)]]
        prompts = [*prompts, *negative]
        if any(key not in self._kept_prompts for key in self._keys(prompts, references)):
            super().keep_prompts(prompts, references)

    def as_trained(self, prompts: Sequence[str]) -> list[str | None]:
        return [prompt or (None if self.negative_prompt is not None else "") for prompt in prompts]

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
        seen = [self._references_in(inputs)] * len(prompts) if self.reads_references else None
        inputs |= self.prompt_inputs(self._encoded(prompts, seen))
        if self.negative_prompt is not None:
            negative = self._encoded([None] * len(prompts), seen)
            taken = inspect.signature(stock_class(pipe).__call__).parameters
            given = {f"{NEGATIVE}{name}": value for name, value in self.prompt_inputs(negative).items()}
            given["negative_prompt"] = None  # not all pipelines leave it away by default
            inputs |= {name: value for name, value in given.items() if name in taken}
        with self.on_device(self.denoiser, "vae"):
            resting = {name: each for name, each in pipe.components.items() if each is self._skeletons.get(name, self)}
            for name in resting:
                setattr(pipe, name, None)
            try:
                with self.tiling(pipe):
                    return pipe(**inputs)
            finally:
                # Not set alone: a pipeline whose component was None once would be saved without it.
                pipe.register_modules(**resting)

    def _encoded(
        self, prompts: Sequence[str | None], references: Sequence[Sequence[Tensor]] | None
    ) -> list[Conditioning]:
        """Encoded prompts, anew where text encoders are trained."""
        models = self.modules()
        encoders = (models[name] for name in self.text_encoders if name in models)
        if any(each.requires_grad for encoder in encoders for each in encoder.parameters()):
            images = [()] * len(prompts) if references is None else references
            with torch.no_grad(), self.on_device(*self.text_encoders):
                return [self._encode(prompt, seen) for prompt, seen in zip(prompts, images, strict=True)]
        self.keep_prompts(prompts, references)
        return self.conditioning(prompts, references)

    @staticmethod
    def _references_in(inputs: Mapping[str, Any]) -> list[Tensor]:
        images = inputs.get("image", ())
        return [to_pixels(to_rgb(image)) for image in (images if isinstance(images, (list, tuple)) else [images])]

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        """Encoded prompts as the pipeline takes them."""
        return {name: torch.stack([row[name] for row in conditioning]) for name in conditioning[0]}

    def guidance_of(self, noisy: Tensor, model: nn.Module | None = None) -> Tensor | None:
        """What the transformer, or another model, is told of guidance, for each sample; None without an embedding."""
        model = self.component(self.denoiser) if model is None else model
        if not getattr(model.config, "guidance_embeds", False):
            return None
        return torch.full((len(noisy),), self.guidance, device=noisy.device)


def is_model(index: Mapping[str, Any], name: str) -> bool:
    """Whether a component of `model_index.json` has weights."""
    kind = _class_of(index, name)
    return kind is not None and issubclass(kind, nn.Module)


def read_models(source: ModelSource, names: Sequence[str]) -> dict[str, nn.Module]:
    """Components of a pipeline on the meta device, by the classes that its `model_index.json` names.

    Raises:
        InputError: one that is not there or cannot be read, or the pipeline has parts that need torchvision.
    """
    index, models = source.config(), {}
    _check_processors(source, index)
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


def _check_tokenizer(source: ModelSource, index: Mapping[str, Any], name: str) -> None:
    """Make sure that a tokenizer is there, if the pipeline has one of this name."""
    kind = _class_of(index, name)
    if kind is None or kind.__name__.endswith("Processor"):
        return
    where = f"{source.given}: its {name}"
    try:
        tokenizer = kind.from_pretrained(**source.config_place, subfolder=name)
        read = tokenizer.decode(tokenizer("a photo").input_ids, skip_special_tokens=True).strip()
    except Exception as error:  # of many kinds
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    if not read:  # what transformers makes of a folder without its files
        raise InputError(f"{where} is missing or has no vocabulary, and without it prompts cannot be read")


def _check_processors(source: ModelSource, index: Mapping[str, Any]) -> None:
    """Make sure that what prepares images for text encoders can be read: only the encoders of editors have it."""
    kinds = [entry[1] for entry in index.values() if isinstance(entry, (list, tuple)) and len(entry) == 2]
    for kind in kinds:
        if str(kind).endswith("Processor") and not kind.endswith("ImageProcessor") and not is_torchvision_available():
            raise InputError(f"{source.given}: its {kind} needs torchvision: pip install torchvision")


def _class_of(index: Mapping[str, Any], name: str) -> type | None:
    entry = index.get(name)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(each, str) for each in entry):
        return None
    library, kind = entry
    if library not in ("diffusers", "transformers"):
        raise InputError(f"{name} is a {kind} of {library}; training covers pipelines of diffusers' own classes")
    return getattr(importlib.import_module(library), kind, None)
