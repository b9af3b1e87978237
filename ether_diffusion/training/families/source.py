"""Where a pipeline comes from, and what is known of it before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline
from torch import nn

from ether_diffusion.base_models import MINIATURE, base_path, miniature_name, missing_locally, public_name
from ether_diffusion.errors import InputError
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families.single_file import configs_of, is_single_file
from ether_diffusion.training.memory import is_out_of_memory
from ether_diffusion.training.options import ModelOptions, ViewOptions, parse_buckets

WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline comes from: a folder, an id on the Hub, or one file, and which revision and variant of it.

    vae: where its autoencoder comes from, if from elsewhere.
    configs: the folder with its configs and tokenizers, where `path` is one file.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    configs: str | None = None

    @classmethod
    def from_options(cls, options: ModelOptions) -> ModelSource:
        """As the flags say. Raises `InputError` where a file of weights cannot be used."""
        path, configs = base_path(options.pretrained_model_name_or_path or MINIATURE), options.config_name_or_path
        if is_single_file(path):
            configs = configs_of(path, configs)
        elif configs is not None:
            raise InputError(f"--config_name_or_path {configs}: has no effect, {path} is no file; drop it")
        return cls(path, options.revision, options.variant, options.pretrained_vae_model_name_or_path, configs)

    @property
    def config_place(self) -> dict[str, Any]:
        """Where configs and tokenizers lie, as the libraries' loading functions take it."""
        return {"pretrained_model_name_or_path": self.configs or self.path, "revision": self.revision}

    @property
    def miniature(self) -> str | None:
        """The name of the miniature that this is; None for other models."""
        return miniature_name(self.path)

    @property
    def name(self) -> str:
        """What to call the model in public: a Hub id as it is, of a local folder only the last part."""
        if self.miniature:
            return public_name(self.miniature)
        return Path(self.path).resolve().name if Path(self.path).exists() else self.path

    def is_called(self, word: str) -> bool:
        """Whether a word is in the model's name, or in what the Hub's cache calls the folders around it."""
        parts = Path(self.path).resolve().parts[-3:] if Path(self.path).exists() else (self.path,)
        return word in "/".join(parts).lower()

    @property
    def on_hub(self) -> bool:
        return not self.miniature and not Path(self.path).exists()

    @property
    def given(self) -> str:
        """The option and its value, to begin an error message with."""
        return f"--pretrained_model_name_or_path {self.path}"

    def config(self, component: str | None = None, kind: type[ConfigMixin] = DiffusionPipeline) -> dict[str, Any]:
        """The JSON config of the pipeline, or of one of its components; no weights are read.

        Raises:
            InputError: it is not there or cannot be read.
        """
        where = {} if component is None else {"subfolder": component}
        with self.reading():
            return dict(kind.load_config(**self.config_place, **where))

    def vae_config(self) -> dict[str, Any]:
        """The JSON config of the autoencoder, wherever it comes from. Raises `InputError` where it cannot be read."""
        if self.vae is None:
            return self.config("vae", AutoencoderKL)
        with self.reading_vae():
            config = dict(AutoencoderKL.load_config(self.vae))
            if config.get("_class_name") != AutoencoderKL.__name__:
                raise ValueError(f"it is a {config.get('_class_name')}, needs an {AutoencoderKL.__name__}")
            return config

    def own_parts(self, dtype: torch.dtype) -> dict[str, Any]:
        """The components that come from elsewhere, loaded, as `from_pretrained` of the pipeline takes them."""
        if self.vae is None:
            return {}
        with self.reading_vae():
            return {"vae": AutoencoderKL.from_pretrained(self.vae, dtype=dtype)}

    def check_variant(self, components: Iterable[str]) -> None:
        """Make sure that a local folder has weights without a variant, where none is asked for.

        Raises:
            InputError: a component has weights of some variant alone; names it.
        """
        for component in components if self.variant is None else ():
            # diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
            files = [each for each in Path(self.path, component).glob("*.*") if each.suffix in WEIGHT_SUFFIXES]
            variants = {each.name.split(".")[1].split("-")[0] if each.name.count(".") > 1 else "" for each in files}
            if variants and "" not in variants:
                flag = f"--variant {' or '.join(sorted(variants))}"
                raise InputError(
                    f"{self.given}: cannot be read as a diffusers pipeline: its {component} has weights of a variant "
                    f"alone; add {flag}"
                )

    def reading(self) -> AbstractContextManager[None]:
        """Turns the errors of a folder or a Hub id that is no usable pipeline into one `InputError`."""
        return _reading("--pretrained_model_name_or_path", self.path, "a diffusers pipeline")

    def reading_vae(self) -> AbstractContextManager[None]:
        """The same for the autoencoder that comes from elsewhere."""
        return _reading("--pretrained_vae_model_name_or_path", str(self.vae), "an autoencoder")


@contextmanager
def _reading(flag: str, path: str, what: str) -> Iterator[None]:
    if problem := missing_locally(path):
        raise InputError(f"{flag} {path}: {problem}")
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Whatever the libraries raise on configs and weights that are not in order
        told = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise InputError(f"{flag} {path}: cannot be read as {what}: {told}") from error


def parameter_counts(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Component -> the number of its parameters."""
    return {name: sum(each.numel() for each in model.parameters()) for name, model in models.items()}


@dataclass(frozen=True)
class Blueprint:
    """A pipeline without its weights, on which everything that can fail is tried first.

    models: the components that can be adapted, on the meta device.
    native_resolution: side in pixels of the images that the denoiser was made for.
    resolution_multiple: what the side of a training image must be divisible by.
    parameters: how many each component of the pipeline has that training needs.
    largest_side: of a training image in pixels; None where there is no bound.
    """

    models: dict[str, nn.Module]
    native_resolution: int
    resolution_multiple: int
    parameters: Mapping[str, int]
    largest_side: int | None = None

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
            if self.largest_side is not None and side > self.largest_side:
                raise InputError(f"{flag}: got {side}, the model takes sides of up to {self.largest_side} pixels")
            if side % factor:
                below = side // factor * factor
                fits = " or ".join(str(size) for size in (below, below + factor) if size)
                raise InputError(
                    f"{flag}: got {side}, needs a multiple of {factor} (the autoencoder's factor): {fits}; the "
                    f"model's native size is {self.native_resolution}"
                )
        return targets
