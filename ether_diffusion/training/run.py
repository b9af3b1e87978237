"""One training run from its options to what it leaves: what the scripts have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.training.card import GRID_NAME, figures_of, write_card
from ether_diffusion.training.checkpoints import Checkpoints, with_fingerprint
from ether_diffusion.training.distributed import check_layout, claim_layout, gathered, on_main_process, shard_frozen
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.families import Blueprint, Family, ModelSource, family_at
from ether_diffusion.training.hub import check_hub, log_patterns, upload
from ether_diffusion.training.loop import WEIGHT_DTYPES, TrainingResult, check_output_dir, make_accelerator, train
from ether_diffusion.training.methods.configs import configs_of, loading_code, read_method, save_trained
from ether_diffusion.training.methods.injection import Configs, add_adapters, dry_run
from ether_diffusion.training.optimizers import check_optimizer, check_schedule, parameter_groups
from ether_diffusion.training.options import TrainingOptions, binding, flatten
from ether_diffusion.training.preview import Preview, is_due

VALIDATION_FOLDER = "validation"

Options = TypeVar("Options", bound=TrainingOptions)


class TrainingRun(Generic[Options]):
    """A run: checked when it is made, then `check`, `load`, `train` and `finish`, in this order, by every process.

    Args:
        options: of the script.
        command: as it was typed.

    Attributes:
        options: once `check` was called, with definite steps and learning rates.
        source, family_class: the base model.
        method, configs: what is trained; component -> its config.
        parameter_count: of what is trained.
        targets: (height, width) that training images can have.
        output_dir: where everything goes; not made yet.
        accelerator: devices and processes.
        layout: what each process holds.

    Class attributes:
        tags: of the model card.
        inputs_code: what the card's code calls the pipeline with besides the prompt.
        can_shard: whether what is trained can be made beside a sharded denoiser.

    Raises:
        InputError: what the user gave cannot be used. No weights were read and nothing was written.
    """

    tags: Sequence[str] = ("dreambooth",)
    inputs_code: str = ""
    can_shard: bool = True

    def __init__(self, options: Options, command: str):
        self.options, self.command = options, command
        check_optimizer(options.optimization)
        self.method = read_method(options.adapter)
        if self.default_learning_rate is None and options.optimization.learning_rate is None:
            raise InputError(f"--learning_rate: is missing; there is no default for {self.method.title}")
        self.source = ModelSource.from_options(options.model)
        self.family_class = family_at(self.source)
        blueprint = self.family_class.read_blueprint(self.source)
        self.configs, self.parameter_count = self.plan(blueprint)
        self.targets = blueprint.targets(options.views)
        self.output_dir = check_output_dir(options.run.output_dir)
        layout = claim_layout()
        self.accelerator = make_accelerator(
            options.run, options.performance, options.optimization.gradient_accumulation_steps
        )
        self.layout = layout if self.accelerator.num_processes > 1 else "replicated"
        denoiser = self.family_class.denoiser
        check_layout(self.layout, options, self.configs, denoiser=denoiser, precision=self.precision)
        if self.layout == "sharded" and not self.can_shard:
            raise InputError(
                "FSDP: what is trained here begins as a copy of the whole denoiser; launch with configs/ddp.yaml"
            )

    def plan(self, blueprint: Blueprint) -> tuple[Configs, int]:
        """What is trained, component -> config, and how many parameters that makes, tried on a model without weights.

        Raises:
            InputError: layers that are not there, or cannot be adapted so.
        """
        configs = configs_of(self.method, self.family_class, self.options.adapter)
        return configs, dry_run(blueprint.models, configs)

    @property
    def deep(self) -> Collection[str]:
        """Names of the models with trained parameters whose activations can be recomputed."""
        return self.configs.keys()

    @property
    def default_learning_rate(self) -> float | None:
        """Of the method; None where there is none."""
        return self.method.learning_rate

    @property
    def precision(self) -> str:
        """The mixed precision: no, fp16 or bf16."""
        return self.accelerator.mixed_precision

    @property
    def view_options(self) -> dict[str, Any]:
        """How images are cut, as `TrainingImages` takes it."""
        return {
            "targets": self.targets,
            "center_crop": self.options.views.center_crop,
            "random_flip": self.options.views.random_flip,
            "fixed_crops": self.options.performance.cache_latents,
            "group_size": self.options.optimization.train_batch_size * self.accelerator.num_processes,
            "seed": self.options.run.seed,
        }

    def check(self, *, epoch_samples: int, depends_on: Mapping[str, str], later: Sequence[str] = ()) -> None:
        """The rest of what can fail, which needs to know the data.

        Args:
            epoch_samples: images in one epoch.
            depends_on: more that the result depends on: flag that named it -> fingerprint.
            later: flags whose fingerprints `checkpoints.bind` will add, once they are known.

        Raises:
            InputError: nothing to go on from, too little room on the disk, or no way to the Hub.
        """
        processes = self.accelerator.num_processes
        optimization = self.options.optimization.resolve(
            default_learning_rate=self.default_learning_rate or 0.0, epoch_samples=epoch_samples, processes=processes
        )
        check_schedule(optimization)
        self.options = replace(self.options, optimization=optimization)
        self.epoch_samples = epoch_samples
        given = {**binding(self.options), **depends_on, "method": self.method.name}
        base = "pretrained_model_name_or_path"
        given[base] = with_fingerprint(given[base], self.source.path)
        given |= {"mixed_precision": self.precision, "num_processes": processes}
        if self.options.adapter.adapter_config is not None:
            content = Path(self.options.adapter.adapter_config).read_bytes()
            given["adapter_config"] = f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"
        self.checkpoints = Checkpoints(self.output_dir, self.options.state, given, later=later)
        self.checkpoints.check_space(self.parameter_count)
        self.hub_id = on_main_process(self.accelerator, lambda: check_hub(self.options.run))

    def load(self, prompts: Sequence[str]) -> Family:
        """The model with its adapter, when it has generated what it makes of these prompts without one."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        performance = self.options.performance
        # Weights that are all trained are kept in float32; those beside adapters stay as they are, in half precision.
        dtype = torch.float32 if None in self.configs.values() else WEIGHT_DTYPES[self.precision]
        self.family = self.family_class.load(self.source, dtype)
        if self.layout == "sharded":
            shard_frozen(self.family.component(self.family.denoiser), self.accelerator)
        idle = self.family.modules().keys() - {self.family.denoiser, *self.configs}
        self.family.freeze(self.accelerator.device, offloaded=sorted(idle) if performance.offload else ())
        self.preview = None
        if self.options.validation.num_validation_images and self._generates:
            self.preview = self.make_preview(prompts)
        self.models = self.adapt()
        others = [model for name, model in self.models.items() if name in self.deep and name != self.family.denoiser]
        self.family.speed_up(performance, [self.family.component(self.family.denoiser), *others])
        return self.family

    @property
    def _generates(self) -> bool:
        """Whether this process takes part in generating: a sharded denoiser runs on all processes or on none."""
        return self.accelerator.is_main_process or self.layout == "sharded"

    def make_preview(self, prompts: Sequence[str]) -> Preview:
        """What generates; it generates the base model now."""
        return Preview(self.family, prompts, self.options.validation, self.options.run.seed)

    def adapt(self) -> dict[str, nn.Module]:
        """Add what is trained to the loaded model: component -> model with trained parameters."""
        models = {name: self.family.component(name) for name in self.configs}
        add_adapters(models, self.configs, seed=self.options.run.seed)
        return models

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as optimisers take it."""
        return parameter_groups(self.models, denoiser=self.family.denoiser, options=self.options.optimization)

    def save(self, prompt: str) -> Path:
        """Write what was trained to the output folder; the file or folder to tell of."""
        metadata = {"prompt": prompt}
        return save_trained(self.family.pipe, self.configs, self.output_dir, method=self.method, metadata=metadata)

    def train(self, objective: nn.Module, what: str) -> TrainingResult:
        """Minimise an objective, with all that the options say.

        Args:
            objective: maps global sample indices to a loss for each; what needs a gradient in it is trained.
            what: the data, in words, for the log.
        """
        optimization, processes = self.options.optimization, self.accelerator.num_processes
        objective.prepare(self.options.performance)
        where = f"{processes} process{'es' * (processes > 1)} ({self.accelerator.device.type})"
        name = self.source.name
        narrate("%s: %d parameters on %s, %s, %s", self.method.title, self.parameter_count, name, what, where)
        return train(
            self.accelerator,
            objective,
            self.parameter_groups(),
            optimization,
            layout=self.layout,
            checkpoints=self.checkpoints,
            tracked={**flatten(self.options), "method": self.method.name},
            validate=self._validate,
            validate_after=is_due(
                self.options.validation,
                epoch_samples=self.epoch_samples,
                step_samples=optimization.samples_per_step(processes),
                steps=optimization.steps,
            ),
        )

    def finish(self, result: TrainingResult, *, prompt: str, images: str) -> None:
        """Leave the weights, a grid of images and a model card in the output folder, and upload them if asked to.

        Args:
            result: of the training.
            prompt: that names what was learned.
            images: how many were trained on, in words.

        Raises:
            OSError: the disk is full, or the upload failed.
        """
        # The weights first: whatever happens to the images, they are there.
        with gathered(self.family.component(self.family.denoiser), self.accelerator):
            if self.accelerator.is_main_process:
                weights = self.save(prompt)
                narrate("weights: %s", weights)
        if self.preview is not None:
            self._report(self.output_dir / GRID_NAME, len(result.losses))
            narrate("images: %s", self.output_dir / GRID_NAME)
        if self.accelerator.is_main_process:
            self._write_card(result, weights, prompt, images)
            if self.hub_id is not None:
                narrate("uploaded: %s", upload(self.output_dir, self.hub_id, ignore=log_patterns(self.options.run)))
        self.accelerator.end_training()

    def loading_code(self) -> str:
        """Lines of Python that load the result, for the card."""
        return loading_code(self.method, list(self.configs))

    def _validate(self, step: int) -> None:
        if self.preview is not None:
            self._report(self.output_dir / VALIDATION_FOLDER / f"step-{step:06}.png", step)

    def _report(self, path: Path, step: int) -> None:
        if self.accelerator.is_main_process:
            self.preview.report(self.accelerator, path, step)
        else:
            self.preview.compare()  # takes part in the generating, writes nothing

    def _write_card(self, result: TrainingResult, weights: Path, prompt: str, images: str) -> None:
        write_card(
            self.output_dir,
            source=self.source,
            title=self.method.title,
            tags=[*self.tags, "peft", self.method.name],
            paper=self.method.paper,
            loading=self.loading_code(),
            weights=weights,
            prompt=prompt,
            prompts=() if self.preview is None else self.preview.prompts,
            figures=figures_of(
                result,
                images=images,
                parameters=self.parameter_count,
                weights=weights,
                learning_rates={group["name"]: group["lr"] for group in self.parameter_groups()},
            ),
            command=self.command,
            with_images=self.preview is not None,
            inputs=self.inputs_code,
            hub_id=self.hub_id,
        )
