"""What is trained: how it is planned without weights, attached to a loaded model, and saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.base_models import absent_components
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.configs import Method, configs_of
from ether_diffusion.training.methods.injection import Configs, add_adapters, dry_run
from ether_diffusion.training.methods.saving import loading_code, save_trained
from ether_diffusion.training.objectives import REFERENCE
from ether_diffusion.training.optimizers import parameter_groups
from ether_diffusion.training.options import TrainingOptions

Options = TypeVar("Options", bound=TrainingOptions)


@dataclass(frozen=True)
class Attached:
    """What is trained, on a loaded model.

    pipe: generates with it.
    models: component -> model with trained parameters.
    """

    pipe: DiffusionPipeline
    models: Mapping[str, nn.Module]


class Adaptation(Generic[Options]):
    """Adapters on components of the pipeline, or all weights of the denoiser: what every training has.

    Args:
        options: of the script.
        method: that the options name.
        family: of the base model.
        blueprint: the base model without its weights, on which everything is tried.

    Attributes:
        configs: component -> config of its adapter; None where all weights are trained.
        parameter_count: of what is trained.

    Class attributes:
        tags: of the model card.
        inputs: what the card's code calls the pipeline with besides the prompt.
        can_shard: whether what is trained can be made beside a sharded denoiser.
        second: what the other image is for where images come in pairs, as `ImageSet` takes it.
        beside: models beside those of the pipeline, without weights, by name.

    Raises:
        InputError: layers that are not there, or cannot be adapted so.
    """

    tags: tuple[str, ...] = ("dreambooth",)
    inputs: str = ""
    can_shard: bool = True
    second: str = REFERENCE
    beside: Mapping[str, nn.Module] = MappingProxyType({})

    def __init__(self, options: Options, method: Method, family: type[Family], blueprint: Blueprint):
        self.method, self.family_class = method, family
        self.configs, self.parameter_count = self.plan(options, blueprint)

    def plan(self, options: Options, blueprint: Blueprint) -> tuple[Configs, int]:
        """Configs and number of parameters, tried on models without weights."""
        configs = configs_of(self.method, self.family_class, options.adapter)
        return configs, dry_run(blueprint.models, configs)

    @property
    def deep(self) -> Collection[str]:
        """Names of the models with trained parameters whose activations can be recomputed."""
        return self.configs.keys()

    @property
    def folders(self) -> Collection[str]:
        """Names of the folders that `save` may write, besides those of the pipeline's components."""
        return ()

    @property
    def default_learning_rate(self) -> float | None:
        """Of the method; None where there is none."""
        return self.method.learning_rate

    def resolve(self, options: Options, accelerator: Accelerator, *, epoch_samples: int) -> Options:
        """The same options with definite steps and learning rates.

        Raises:
            InputError: rates that have no effect, or a precision that cannot be had for this.
        """
        optimization = options.optimization.resolve(
            default_learning_rate=self.default_learning_rate or 0.0,
            epoch_samples=epoch_samples,
            processes=accelerator.num_processes,
        )
        return replace(options, optimization=optimization)

    def depends_on(self) -> Mapping[str, str]:
        """What the result depends on besides the options: flag that named it -> fingerprint."""
        return {}

    def attach(self, family: Family, options: Options) -> Attached:
        """Add what is trained to the loaded model."""
        models = {name: family.component(name) for name in self.configs}
        add_adapters(models, self.configs, seed=options.run.seed)
        return Attached(family.pipe, models)

    def generating(self, attached: Attached, dtype: torch.dtype) -> AbstractContextManager:
        """A context for generating during the training; dtype is that of the frozen weights."""
        return nullcontext()

    def parameter_groups(self, attached: Attached, options: Options) -> list[dict[str, Any]]:
        """What is trained, as optimisers take it."""
        return parameter_groups(attached.models, denoiser=self.denoiser, options=options.optimization)

    @property
    def denoiser(self) -> str:
        """Name of the model that has the method's learning rate; text encoders may have one of their own."""
        return self.family_class.denoiser

    def save(self, attached: Attached, family: Family, folder: Path, metadata: Mapping[str, str]) -> Path:
        """Write what was trained to a folder; the file or folder to tell of."""
        if self.method.layout == "full":
            family.complete()
        return save_trained(family.pipe, self.configs, folder, method=self.method, metadata=metadata)

    def loading_code(self, attached: Attached, source: ModelSource) -> str:
        """Lines of Python that load the result, for the card."""
        index = {**attached.pipe.config, "_class_name": type(attached.pipe).__name__}
        return loading_code(self.method, list(self.configs), absent_components(index))
