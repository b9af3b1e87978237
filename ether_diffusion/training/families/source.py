"""Where a pipeline comes from, and what is known of it before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from ether_diffusion import miniature
from ether_diffusion.errors import InputError
from ether_diffusion.files import MINIATURE_NAME, is_miniature
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.options import ModelOptions, ViewOptions, parse_buckets


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline comes from: a folder or an id on the Hub, and which revision and variant of it."""

    path: str
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def from_options(cls, options: ModelOptions) -> ModelSource:
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
        except MemoryError:
            raise
        except Exception as error:  # whatever the libraries raise on configs and weights that are not in order
            told = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
            raise InputError(f"{self.given}: cannot be read as a diffusers pipeline: {told}") from error


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
    """

    models: dict[str, nn.Module]
    native_resolution: int
    resolution_multiple: int
    parameters: Mapping[str, int]

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
