"""One training run from its options to what it leaves, in four steps that every process takes.

`TrainingRun` is planned from the options alone, `check` makes it a `CheckedRun`, which has looked at everything that
can fail, `load` makes that a `LoadedRun`, which has the model in memory; it trains and leaves the result. Each step
is made of the one before and changes nothing in it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.errors import InputError
from ether_diffusion.images import to_pixels
from ether_diffusion.training.accelerator import make_accelerator, on_main_process
from ether_diffusion.training.adaptation import Adaptation, Attached
from ether_diffusion.training.card import CONTROL_NAME, GRID_NAME, CardContent, figures_of, write_card
from ether_diffusion.training.checkpoints import Checkpoints, with_fingerprint
from ether_diffusion.training.data import TrainingImages
from ether_diffusion.training.distributed import check_layout, claim_layout, gathered, shard_frozen
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.families import Family, ModelSource, family_at
from ether_diffusion.training.families.quantization import check_quantization
from ether_diffusion.training.hub import check_hub, log_patterns, upload
from ether_diffusion.training.loop import Trainer, TrainingResult
from ether_diffusion.training.methods.configs import read_method
from ether_diffusion.training.objectives import ImageSet
from ether_diffusion.training.optimizers import check_optimizer, check_schedule
from ether_diffusion.training.options import VALIDATION_FOLDER, FlowOptions, TrainingOptions, binding, flatten
from ether_diffusion.training.output_folder import OutputFolder, check_output_dir
from ether_diffusion.training.preview import Preview, check_sampling, is_due, without_memory_a_warning

logger = logging.getLogger(__name__)


class TrainingRun:
    """A run as the options plan it.

    Args:
        options: of the script.
        command: as it was typed.
        adaptation: what is trained; the attribute of this name was tried on the base model without weights.
        flow: how noisy what is trained on is, for a base of flow matching.

    Attributes:
        method: that the options name.
        source, family_class, blueprint: the base model.
        targets: (height, width) that training images can have.
        output_dir: where everything goes; not made yet.
        accelerator: devices and processes.
        layout: what each process holds.

    Raises:
        InputError: what the user gave cannot be used. No weights were read and nothing was written.
    """

    def __init__(
        self,
        options: TrainingOptions,
        command: str,
        adaptation: type[Adaptation] = Adaptation,
        flow: FlowOptions | None = None,
    ):
        self.options, self.command, self.flow = options, command, flow or FlowOptions()
        check_optimizer(options.optimization)
        self.method = read_method(options.adapter)
        self.source = ModelSource.from_options(options.model)
        with self.source.reading():
            self.family_class = family_at(self.source)
            self.blueprint = blueprint = self.family_class.read_blueprint(self.source)
        family = self.family_class
        for_steps = {
            "snr_gamma": options.optimization.snr_gamma,
            "validation_scheduler": options.validation.validation_scheduler,
        }
        if hint := family.distilled(self.source):
            logger.warning("%s", hint)
        config = blueprint.models[family.denoiser].config
        has_guidance = bool(config.get("guidance_embeds", False))
        self.flow.check_meaning(family.is_flow, for_steps, family.pipeline_class, has_guidance=has_guidance)
        self.adaptation = adaptation(options, self.method, self.family_class, blueprint)
        if self.adaptation.default_learning_rate is None and options.optimization.learning_rate is None:
            raise InputError(f"--learning_rate: is missing; there is no default for {self.method.title}")
        self.targets = blueprint.targets(options.views)
        check_sampling(self.source, options.validation)
        self.output_dir = check_output_dir(options.run.output_dir)
        if self.output_dir.resolve() == Path(self.source.path).resolve():
            raise InputError(f"--output_dir {self.output_dir}: is the folder of the base model; take another")
        layout = claim_layout()
        self.accelerator = make_accelerator(options.run, options.performance, options.optimization)
        self.layout = layout if self.accelerator.num_processes > 1 else "replicated"
        if not options.run.dry_run:  # which may be made on another machine
            check_quantization(options.performance.quantize, self.accelerator.device)
        if options.performance.quantize and (self.method.name == "full" or self.layout == "sharded"):
            kind = options.performance.quantize
            raise InputError(f"--quantize {kind}: needs weights that stay frozen and undivided; drop it")
        denoiser = self.family_class.denoiser
        check_layout(self.layout, options, self.adaptation.configs, denoiser=denoiser, precision=self.precision)
        if self.layout == "sharded" and not self.adaptation.can_shard:
            raise InputError(
                "FSDP: what is trained here begins as a copy of the whole denoiser; launch with configs/ddp.yaml"
            )

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

    def check(self, *, epoch_samples: int, depends_on: Mapping[str, str], later: Sequence[str] = ()) -> CheckedRun:
        """Check the rest of what can fail, which needs to know the data.

        Args:
            epoch_samples: images in one epoch.
            depends_on: more that the result depends on: flag that named it -> fingerprint.
            later: flags whose fingerprints `checkpoints.bind` will add, once they are known.

        Raises:
            InputError: nothing to go on from, too little room on the disk, or no way to the Hub.
        """
        options = self.adaptation.resolve(self.options, self.accelerator, epoch_samples=epoch_samples)
        check_schedule(options.optimization)
        given = {**binding(options), **depends_on, **self.adaptation.depends_on(), "method": self.method.name}
        base = "pretrained_model_name_or_path"
        given[base] = with_fingerprint(given[base], self.source.path)
        beside = {"pretrained_vae_model_name_or_path": self.source.vae, "config_name_or_path": self.source.configs}
        given |= {flag: with_fingerprint(path, path) for flag, path in beside.items() if path is not None}
        if self.family_class.is_flow:
            given |= self.flow.resolved()
        given |= {"mixed_precision": self.precision, "num_processes": self.accelerator.num_processes}
        if options.adapter.adapter_config is not None:
            content = Path(options.adapter.adapter_config).read_bytes()
            given["adapter_config"] = f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"
        checkpoints = Checkpoints(self.output_dir, options.state, given, later=later)
        # Some methods leave a folder for each component; `_class_name` and the like are no names of folders.
        output = OutputFolder(self.output_dir, {*self.source.config(), *self.adaptation.folders})
        output.check_unused(goes_on=checkpoints.goes_on, overwrite=options.state.overwrite_output_dir)
        checkpoints.check_space(self.adaptation.parameter_count)
        hub_id = on_main_process(self.accelerator, lambda: check_hub(options.run))
        return CheckedRun(self, options, epoch_samples, checkpoints, output, hub_id)


@dataclass(frozen=True)
class CheckedRun:
    """A run in which nothing that the user gave can fail any more.

    options: with definite steps and learning rates.
    epoch_samples: images in one epoch.
    checkpoints: where it starts, and how it saves.
    output: the output folder, as it was found.
    hub_id: the repository that the result goes to; None without one.
    """

    run: TrainingRun
    options: TrainingOptions
    epoch_samples: int
    checkpoints: Checkpoints
    output: OutputFolder
    hub_id: str | None

    def claimed(self) -> AbstractContextManager[None]:
        """A context in which the output folder is this run's alone; all that follows happens in it.

        Raises:
            InputError: another run is at work there.
        """
        return self.output.claimed(self.run.accelerator)

    def load(
        self,
        prompts: Sequence[str],
        drawn_from: Mapping[int, TrainingImages],
        controls: Sequence[Image.Image] | None = None,
        reference: Image.Image | None = None,
    ) -> LoadedRun:
        """Load the model, generate what it makes of these prompts, and attach what is trained.

        Args:
            prompts: of the sample images.
            drawn_from: seed -> training images.
            controls: control image of each prompt, where control is trained.
            reference: image that the sample images are edited from, where references are trained on.
        """
        run, options, configs = self.run, self.options, self.run.adaptation.configs
        # Weights that are all trained are kept in float32; those beside adapters stay as they are, in half precision.
        dtype = torch.float32 if None in configs.values() else PRECISIONS[run.precision]
        family = run.family_class.load(run.source, dtype, options.performance.quantize)
        family.set_noise(run.flow)
        family.vae_tiling = options.performance.vae_tiling
        if run.layout == "sharded":
            shard_frozen(family.component(family.denoiser), run.accelerator)
        idle = set(family.component_names) - {family.denoiser, *configs}
        family.freeze(run.accelerator.device, offloaded=sorted(idle) if options.performance.offload else ())
        offset = options.optimization.noise_offset
        how = {"noise_offset": offset, "second": run.adaptation.second}
        sets = [ImageSet(each, family, seed=seed, **how) for seed, each in drawn_from.items()]
        self._encode(family, sets, prompts, reference)
        preview = None
        # A sharded denoiser runs on all processes or on none.
        generates = run.accelerator.is_main_process or run.layout == "sharded"
        if options.validation.num_validation_images and generates:
            with without_memory_a_warning():
                preview = Preview(
                    family,
                    prompts,
                    options.validation,
                    options.run.seed,
                    controls,
                    target=run.targets[0],
                    reference=reference,
                )
        attached = run.adaptation.attach(family, options)
        denoiser = family.component(family.denoiser)
        deep = [model for name, model in attached.models.items() if name in run.adaptation.deep]
        family.speed_up(options.performance, [denoiser, *(model for model in deep if model is not denoiser)])
        return LoadedRun(self, family, attached, sets, preview, None if controls is None else controls[0])

    def _encode(
        self, family: Family, sets: Sequence[ImageSet], prompts: Sequence[str], reference: Image.Image | None
    ) -> None:
        """Encode prompts and images now, where that is asked for or saves memory, and let go what has done its work.

        The text encoders of transformers are large: they go before anything else is loaded.
        """
        options = self.options.performance
        trains_text = any(name in self.run.adaptation.configs for name in family.text_encoders)
        if options.pre_compute_text_embeddings or (family.is_flow and not trains_text):
            learned = {key: seen for each in sets for key, seen in each.prompts().items()}
            shown = prompts if family.is_flow else ()
            seen = None
            if family.reads_references:
                seen = [*learned.values(), *[[to_pixels(reference)]] * len(shown)]
            family.keep_prompts([*family.as_trained([prompt for prompt, _ in learned]), *shown], seen)
        if options.cache_latents:
            for each in sets:
                each.encode_all()
            family.offload("vae")
        else:
            family.component("vae")  # whatever is wrong with it shows before the denoiser is read


@dataclass(frozen=True)
class LoadedRun:
    """A run with its model in memory.

    family: the base model.
    attached: what is trained, on it.
    sets: what samples are drawn from.
    preview: makes sample images; None where this process makes none.
    control: the control image that belongs to the first prompt, where control is trained.
    """

    checked: CheckedRun
    family: Family
    attached: Attached
    sets: Sequence[ImageSet]
    preview: Preview | None
    control: Image.Image | None = None

    @property
    def run(self) -> TrainingRun:
        return self.checked.run

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as optimisers take it."""
        return self.run.adaptation.parameter_groups(self.attached, self.checked.options)

    def train(self, objective: nn.Module, what: str) -> TrainingResult:
        """Minimise an objective, with all that the options say.

        Args:
            objective: maps global sample indices to a loss for each; what needs a gradient in it is trained. Its
                `load` reads the files of samples.
            what: the data, in words, for the log.
        """
        run, options = self.run, self.checked.options
        optimization, processes = options.optimization, run.accelerator.num_processes
        where = f"{processes} process{'es' * (processes > 1)} ({run.accelerator.device.type})"
        count = run.adaptation.parameter_count
        narrate("%s: %d parameters on %s, %s, %s", run.method.title, count, run.source.name, what, where)
        trainer = Trainer(
            run.accelerator,
            objective,
            self.parameter_groups(),
            optimization,
            layout=run.layout,
            load=objective.load,
            checkpoints=self.checked.checkpoints,
            validate=lambda step: self._report(run.output_dir / VALIDATION_FOLDER / f"step-{step:06}.png", step),
            validate_after=is_due(
                options.validation,
                epoch_samples=self.checked.epoch_samples,
                step_samples=optimization.samples_per_step(processes),
                steps=optimization.steps,
            ),
        )
        if run.accelerator.is_main_process:  # now that nothing of the new run can fail any more
            self.checked.checkpoints.remove_others()
            self._remove_later_images()
        return trainer.train({**flatten(options), "method": run.method.name})

    def finish(
        self, result: TrainingResult, *, prompt: str, images: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Leave the weights, a grid of images and a model card in the output folder, and upload them if asked to.

        Args:
            result: of the training.
            prompt: that names what was learned.
            images: how many were trained on, in words.
            metadata: more to record in the file of weights.

        Raises:
            OSError: the disk is full, or the upload failed.
        """
        run, hub_id, about = self.run, self.checked.hub_id, {"prompt": prompt, **(metadata or {})}
        # The weights first: whatever happens to the images, they are there.
        with gathered(self.family.component(self.family.denoiser), run.accelerator):
            if run.accelerator.is_main_process:
                weights = run.adaptation.save(self.attached, self.family, run.output_dir, about)
                narrate("weights: %s", weights)
                (run.output_dir / GRID_NAME).unlink(missing_ok=True)  # of other weights, where there is one
                if self.control is not None:
                    self.control.save(run.output_dir / CONTROL_NAME)
        self._report(run.output_dir / GRID_NAME, len(result.losses))
        if self.preview is not None:
            narrate("images: %s", run.output_dir / GRID_NAME)
        if run.accelerator.is_main_process:
            self._write_card(result, weights, prompt, images)
            if hub_id is not None:
                ignore = log_patterns(run.options.run)
                narrate("uploaded: %s", upload(run.output_dir, hub_id, ignore=ignore))
        run.accelerator.end_training()

    def _remove_later_images(self) -> None:
        """Remove the images of the training's steps that an earlier run made after the step where this one starts."""
        checkpoints = self.checked.checkpoints
        if not (checkpoints.goes_on or self.checked.options.state.overwrite_output_dir):
            return
        begun = checkpoints.start.step if checkpoints.goes_on else 0
        for path in (self.run.output_dir / VALIDATION_FOLDER).glob("step-*.png"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > begun:
                path.unlink()

    def _report(self, path: Path, step: int) -> None:
        """Generate with the model as it is, if this process generates."""
        if self.preview is not None:
            dtype = PRECISIONS[self.run.precision]
            with without_memory_a_warning(), self.run.adaptation.generating(self.attached, dtype):
                self.preview.report(self.run.accelerator, path, step, self.attached.pipe)

    def _write_card(self, result: TrainingResult, weights: Path, prompt: str, images: str) -> None:
        run, adaptation = self.run, self.run.adaptation
        content = CardContent(
            source=run.source,
            method=run.method,
            tags=[*adaptation.tags, "peft", run.method.name],
            loading=adaptation.loading_code(self.attached, run.source),
            weights=weights,
            prompt=prompt,
            prompts=() if self.preview is None else self.preview.prompts,
            figures=figures_of(
                result,
                images=images,
                parameters=adaptation.parameter_count,
                weights=weights,
                learning_rates={group["name"]: group["lr"] for group in self.parameter_groups()},
            ),
            command=run.command,
            inputs=adaptation.inputs,
            hub_id=self.checked.hub_id,
        )
        write_card(run.output_dir, content)
