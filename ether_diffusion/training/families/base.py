"""What a family provides, and where its models come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ether_diffusion import miniature
from ether_diffusion.errors import InputError
from ether_diffusion.files import MINIATURE_NAME, is_miniature
from ether_diffusion.training.data.views import Framing, Target
from ether_diffusion.training.options import ModelOptions, PerformanceOptions, ViewOptions, parse_buckets
from ether_diffusion.tuner.attention import enable_ether_attention

Conditioning = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline comes from: a folder or an id on the Hub, and which revision and variant of it."""

    path: str
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def from_options(cls, options: ModelOptions) -> "ModelSource":
        path = options.pretrained_model_name_or_path
        return cls(str(miniature.FOLDER) if path is None else path, options.revision, options.variant)

    @property
    def is_miniature(self) -> bool:
        return is_miniature(self.path)

    @property
    def name(self) -> str:
        """What to call the model in public: a Hub id as it is, of a local folder only the last part."""
        if self.is_miniature:
            return MINIATURE_NAME
        return Path(self.path).resolve().name if Path(self.path).exists() else self.path

    @property
    def on_hub(self) -> bool:
        return not self.is_miniature and not Path(self.path).exists()

    @property
    def given(self) -> str:
        """The option and its value, to begin an error message with."""
        return f"--pretrained_model_name_or_path {self.path}"

    def pipeline_class(self) -> str:
        """The class named in `model_index.json`."""
        return str(self.config()["_class_name"])

    def config(self, component: str | None = None, kind: type[ConfigMixin] = DiffusionPipeline) -> dict[str, Any]:
        """The JSON config of the pipeline, or of one of its components; no weights are read.

        Raises:
            InputError: it is not there or cannot be read.
        """
        where = {} if component is None else {"subfolder": component}
        with self.reading():
            return dict(kind.load_config(self.path, revision=self.revision, **where))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns the errors of a folder or a Hub id that is no usable pipeline into one `InputError`."""
        looks_local = self.path.startswith(("/", ".", "~", "\\")) or self.path.count("/") > 1
        if looks_local and not Path(self.path).is_dir():
            raise InputError(f"{self.given}: there is no such folder")
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.given}: cannot be read as a diffusers pipeline: {error}") from error


@dataclass(frozen=True)
class Blueprint:
    """A pipeline without its weights, on which everything that can fail is tried first.

    models: the components that can be adapted, on the meta device.
    native_resolution: side in pixels of the images that the denoiser was made for.
    resolution_multiple: what the side of a training image must be divisible by.
    """

    models: dict[str, nn.Module]
    native_resolution: int
    resolution_multiple: int

    def targets(self, options: ViewOptions) -> list[Target]:
        """The (height, width) that training images can have: the buckets or the resolution asked for, or the native
        square.

        Raises:
            InputError: the models cannot take images of this size.
        """
        if options.aspect_ratio_buckets is not None:
            targets = list(parse_buckets(options.aspect_ratio_buckets))
            flag = f"--aspect_ratio_buckets {options.aspect_ratio_buckets}"
        else:
            side = self.native_resolution if options.resolution is None else options.resolution
            targets, flag = [(side, side)], "--resolution"
        factor = self.resolution_multiple
        for side in (side for target in targets for side in target):
            if side % factor:
                below = side // factor * factor
                fits = " or ".join(str(size) for size in (below, below + factor) if size)
                raise InputError(
                    f"{flag}: got {side}, needs a multiple of {factor} (the autoencoder's factor): {fits}; the "
                    f"model's native size is {self.native_resolution}"
                )
        return targets


class Family(ABC):
    """One kind of pipeline, as training sees it. Shapes: pixels (3, h, w), latents (b, c, h', w').

    Class attributes:
        pipeline_class: the pipeline that it covers.
        denoiser: name of the component that removes noise.
        text_encoders: names of the components that encode prompts.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.device = self.component(self.denoiser).device
        self._offloaded: set[str] = set()

    @classmethod
    @abstractmethod
    def read_blueprint(cls, source: ModelSource) -> Blueprint:
        """The pipeline without weights. Raises `InputError` where training does not cover this pipeline."""

    @classmethod
    @abstractmethod
    def load(cls, source: ModelSource, dtype: torch.dtype) -> "Family":
        """The pipeline with its weights, all of one dtype. Raises `InputError` where it cannot be read."""

    @property
    @abstractmethod
    def native_resolution(self) -> int:
        """Side in pixels of the images that the denoiser was made for."""

    @property
    @abstractmethod
    def timestep_count(self) -> int:
        """Number of timesteps of the training schedule."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser is told; every tensor has one row per prompt. Gradients flow to the text encoders."""

    def encode_framings(self, framings: Sequence[Framing]) -> Conditioning:
        """What the denoiser is told of size and crop, one row per view; nothing unless the family says otherwise."""
        return {}

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """One image (3, h, w) as the autoencoder's distribution: its parameters, (2c, h', w'), float32."""

    @abstractmethod
    def make_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Scaled latents (c, h', w'), float32, drawn from one distribution, or its mean where generator is None."""

    @abstractmethod
    def draw_timestep(self, generator: torch.Generator) -> int:
        """A timestep for training, as this family distributes them."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents at these timesteps (b,), float32."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, float32."""

    @abstractmethod
    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights of the losses at these timesteps (b,), float32.

        min(SNR, γ) / SNR for noise targets, min(SNR, γ) / (SNR + 1) for velocity targets, SNR = ᾱ / (1 − ᾱ).

        Source: Min-SNR, arXiv:2303.09556, section 3.4.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the denoiser answers, in the shape of the latents.

        conditioning: of prompts and of framings, in one mapping.
        """

    def component(self, name: str) -> nn.Module:
        return getattr(self.pipe, name)

    def modules(self) -> dict[str, nn.Module]:
        """The components that have weights."""
        return {name: each for name, each in self.pipe.components.items() if isinstance(each, nn.Module)}

    def freeze(self, device: torch.device, offloaded: Sequence[str] = ()) -> None:
        """All components to the device, in evaluation mode and without gradients.

        parked: those that stay in the CPU's memory except where `at_work` brings them in.
        """
        self.device = device
        self._offloaded = set(offloaded)
        for name, component in self.modules().items():
            component.to("cpu" if name in self._offloaded else device)
            component.eval().requires_grad_(False)

    def offload(self, *names: str) -> None:
        """Take components off the device; `at_work` brings them in."""
        self._offloaded |= set(names)
        for name in names:
            self.component(name).to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Components on the device; on leaving, those that were parked are so again."""
        visitors = [name for name in names if name in self._offloaded]
        self._offloaded -= set(visitors)
        try:
            for name in visitors:
                self.component(name).to(self.device)
            yield
        finally:
            if visitors:
                self.offload(*visitors)

    def freeze_unused(self) -> None:  # noqa: B027 (most families use all of their layers)
        """Take the gradients from layers on which `predict` does not depend: data parallel training refuses them."""

    def speed_up(self, options: PerformanceOptions, models: Iterable[nn.Module]) -> None:
        """Attention backend, gradient checkpointing and compilation; called when the adapters are on.

        models: those through which gradients flow.
        """
        denoiser = self.component(self.denoiser)
        if options.attention:
            enable_ether_attention(denoiser, options.attention)
        if options.gradient_checkpointing:
            for model in models:
                if isinstance(model, ModelMixin):
                    model.enable_gradient_checkpointing()
                else:
                    model.activation_checkpointing_enable()  # transformers' name for it
        if options.compile:  # at the first call; block by block where the model is made of equal ones
            if getattr(denoiser, "_repeated_blocks", None):
                denoiser.compile_repeated_blocks()
            else:
                denoiser.compile()
