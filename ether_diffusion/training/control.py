"""Teach a diffusion model to follow control images: semantic maps, edges, poses, depth.

    accelerate launch train_controlnet_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir data --validation_image map.png --validation_prompt "a red house" \\
        --mixed_precision fp16 --train_batch_size 8 --max_train_steps 20000 --output_dir out/maps

--control_type light, the paper's setting, trains a small encoder beside the reflections of a frozen UNet and leaves
one file; --control_type controlnet trains a ControlNet whose copied weights are frozen under reflections, and leaves a
stock ControlNet folder besides. Everything that can be wrong is checked before the weights are loaded. A run that was
stopped goes on with --resume_from_checkpoint latest.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.errors import InputError
from ether_diffusion.images import INTERPOLATIONS, read_image
from ether_diffusion.training.card import opening
from ether_diffusion.training.checkpoints import with_fingerprint
from ether_diffusion.training.control_objectives import CONTROLNET, ENCODER, ControlNetObjective, LightControlObjective
from ether_diffusion.training.control_preview import ControlPreview
from ether_diffusion.training.data.pairs import ControlImages, find_pairs
from ether_diffusion.training.data.views import center_cut
from ether_diffusion.training.entry import run_script
from ether_diffusion.training.families import Blueprint
from ether_diffusion.training.loop import WEIGHT_DTYPES, TrainingResult
from ether_diffusion.training.methods.configs import configs_of, loading_code, save_trained
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs, add_adapters, dry_run
from ether_diffusion.training.objectives import DenoisingObjective, ImageSet
from ether_diffusion.training.optimizers import parameter_groups
from ether_diffusion.training.options import CONTROL_LEARNING_RATE, NO_METHOD, ControlTrainingOptions
from ether_diffusion.training.options import ControlTrainingOptions as Options
from ether_diffusion.training.run import TrainingRun

WHOLE_MODULES = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding")
"""Parts of a ControlNet that begin at zero or at random, so they are trained as they are."""
FITTING = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet must have in common with its UNet: what goes in, and the shapes of what is added."""


class ControlRun(TrainingRun[ControlTrainingOptions]):
    """A run that learns a control signal: `TrainingRun`, with a light encoder or a ControlNet.

    Attributes:
        is_light: whether it is `--control_type light`.
        control: the encoder or the ControlNet, once the model is loaded.
    """

    tags = ("controlnet",)

    @property
    def can_shard(self) -> bool:
        return self.is_light

    @property
    def deep(self) -> Collection[str]:
        return self.configs.keys() if self.is_light else {CONTROLNET}

    @property
    def is_light(self) -> bool:
        return self.options.control.control_type == "light"

    @property
    def one_file(self) -> bool:
        """Whether one file holds all that was trained."""
        return self.method.layout == "ether" or self.method.name == NO_METHOD

    @property
    def default_learning_rate(self) -> float | None:
        return CONTROL_LEARNING_RATE if self.method.name == NO_METHOD else super().default_learning_rate

    def check(self, *, epoch_samples: int, depends_on: Mapping[str, str]) -> None:
        if not self.is_light and self.precision == "fp16" and self.accelerator.device.type == "cpu":
            raise InputError(
                "--mixed_precision fp16: --control_type controlnet needs a GPU for it (on a CPU, autocast leaves "
                "convolutions in the precision of their weights); use bf16 or no"
            )
        optimization, control = self.options.optimization, self.options.control
        if optimization.optimizer == "prodigy" and control.control_lr != CONTROL_LEARNING_RATE:
            raise InputError(f"--control_lr: got {control.control_lr:g}, --optimizer prodigy takes one learning rate")
        if not self.configs and optimization.optimizer != "prodigy" and optimization.learning_rate is not None:
            raise InputError("--learning_rate: has no effect with --method none; use --control_lr")
        if optimization.scale_lr:
            rate = control.control_lr * optimization.samples_per_step(self.accelerator.num_processes)
            self.options = replace(self.options, control=replace(control, control_lr=rate))
        if (path := control.controlnet_model_name_or_path) is not None:
            depends_on = {**depends_on, "controlnet_model_name_or_path": with_fingerprint(path, path)}
        super().check(epoch_samples=epoch_samples, depends_on=depends_on)

    def plan(self, blueprint: Blueprint) -> tuple[Configs, int]:
        configs = dict(configs_of(self.method, self.family_class, self.options.adapter))
        unet, self.factor = blueprint.models["unet"], blueprint.resolution_multiple
        with torch.device("meta"):
            encoder = self._make_encoder(unet)
            self.widths = encoder.config.block_out_channels
            controlnet = None if self.is_light else self._plan_controlnet(unet)
        if controlnet is None:
            return configs, dry_run(blueprint.models, configs) + count_parameters(encoder)
        configs = {CONTROLNET: configs["unet"]} if "unet" in configs else {}
        count = dry_run({CONTROLNET: controlnet}, configs)
        if configs.get(CONTROLNET, "none") is None:  # every weight is trained, these as well
            return configs, count
        return configs, count + sum(count_parameters(getattr(controlnet, name)) for name in WHOLE_MODULES)

    def check_images(self, images: ControlImages) -> None:
        """Read the first pair and the validation images, so that what is wrong with them shows at once.

        Raises:
            InputError: an image that cannot be read, or a pair of two shapes.
        """
        first = images.view(0)
        images.pixels(first), images.control(first)
        pairs = [(read_image(path), prompt) for path, prompt in self.options.validation.pairs]
        if not pairs:
            values = images.control(first).mul(255).round().byte().permute(1, 2, 0)
            pairs = [(Image.fromarray(values.numpy()), images.prompt(first, 0))]
        resample = INTERPOLATIONS[self.options.control.conditioning_interpolation]
        self.validation_pairs = [(center_cut(image, self.targets[0], resample), prompt) for image, prompt in pairs]

    def make_preview(self, prompts: Sequence[str]) -> ControlPreview:
        return ControlPreview(self.family, self.validation_pairs, self.options.validation, self.options.run.seed)

    def adapt(self) -> dict[str, nn.Module]:
        pipe = self.family.pipe
        kept = {"dtype": pipe.unet.dtype}  # else `from_pipe` would make all of it float32
        if self.is_light:
            # Before there are adapters, which are float32 in every precision.
            self.pipe = self.family.light_control_pipeline_class.from_pipe(pipe, **kept)
            models = super().adapt()
            with torch.random.fork_rng(devices=[]):  # made on the CPU
                torch.manual_seed(self.options.run.seed)
                self.control = self._make_encoder(pipe.unet).to(self.accelerator.device)
            self.pipe.add_control(ADAPTER_NAME, self.control)
            models[ENCODER] = self.control
        else:
            self.control = self._load_controlnet().to(self.accelerator.device).requires_grad_(False)
            self.pipe = self.family.controlnet_pipeline_class.from_pipe(pipe, controlnet=self.control, **kept)
            models = {CONTROLNET: self.control}
            add_adapters({name: models[name] for name in self.configs}, self.configs, seed=self.options.run.seed)
            for name in WHOLE_MODULES:
                getattr(self.control, name).float().requires_grad_(True)
        if self.preview is not None:
            self.preview.pipe, self.preview.precision = self.pipe, WEIGHT_DTYPES[self.precision]
        return models

    def objective(self, images: ControlImages) -> DenoisingObjective:
        """What is minimised."""
        optimization = self.options.optimization
        pictures = ImageSet(images, self.family, seed=self.options.run.seed, noise_offset=optimization.noise_offset)
        if self.is_light:
            return LightControlObjective(
                self.family, self.control, pictures, trained=list(self.configs), snr_gamma=optimization.snr_gamma
            )
        return ControlNetObjective(self.family, self.control, pictures, snr_gamma=optimization.snr_gamma)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's parameters as in every run, and what else is trained, with a rate of its own."""
        optimization = self.options.optimization
        rate = self.options.control.control_lr
        if optimization.optimizer == "prodigy":
            rate = optimization.learning_rate
        whole = [self.control] if self.is_light else [getattr(self.control, name) for name in WHOLE_MODULES]
        own = [each for module in whole for each in module.parameters() if each.requires_grad]
        groups: list[dict[str, Any]] = []
        if self.configs:
            taken = {id(each) for each in own}
            denoiser = self.family.denoiser if self.is_light else CONTROLNET
            models = {name: self.models[name] for name in self.configs}
            for group in parameter_groups(models, denoiser=denoiser, options=optimization):
                groups.append({**group, "params": [each for each in group["params"] if id(each) not in taken]})
        return [*groups, {"params": own, "lr": rate, "name": "control"}]

    def save(self, prompt: str) -> Path:
        """Light control with ETHER or alone: one file. A ControlNet: one file, and the merged ControlNet as a folder.

        Peers of ETHER are saved as in every run, and encoder or ControlNet beside them.
        """
        folder, metadata = self.output_dir, {"prompt": prompt}
        if self.is_light:
            if self.one_file:
                return self.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata)
            self.control.save_pretrained(folder / ENCODER)
            return save_trained(self.family.pipe, self.configs, folder, method=self.method, metadata=metadata)
        if self.one_file:
            whole = {CONTROLNET: list(WHOLE_MODULES)}
            self.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata, replaced_modules=whole)
        merged(self.control).save_pretrained(folder / CONTROLNET)
        return folder / CONTROLNET

    @property
    def inputs_code(self) -> str:
        return "control_image=control" if self.is_light else "image=control"

    def loading_code(self) -> str:
        kind = type(self.pipe)
        shown = "the control image"
        if not self.is_light and self.options.control.conditioning_interpolation == "nearest":
            shown += ", at the size of the result: stock pipelines smooth what they resize (Lanczos)"
        lines = ["from diffusers.utils import load_image", f'control = load_image("map.png")  # {shown}']
        if not self.is_light:
            lines += [
                "from diffusers import ControlNetModel",
                f'controlnet = ControlNetModel.from_pretrained({{where}}, subfolder="{CONTROLNET}")',
                opening(self.source, kind, "controlnet=controlnet"),
            ]
        elif self.one_file:
            lines += [opening(self.source, kind), "pipe.load_ether_weights({where})"]
        else:
            whole = [
                f"from ether_diffusion import {kind.__name__}",
                f"pipe = {kind.__name__}.from_pretrained({{where}})",
            ]
            peer = [opening(self.source, kind), loading_code(self.method, list(self.configs))]
            lines += [
                *(whole if self.method.layout == "full" else peer),
                "from ether_diffusion import ControlEncoder",
                f'encoder = ControlEncoder.from_pretrained({{where}}, subfolder="{ENCODER}")',
                'pipe.add_control("control", encoder)',
            ]
        return "\n".join(lines)

    def _make_encoder(self, unet: nn.Module) -> ControlEncoder:
        interpolation = self.options.control.conditioning_interpolation
        return ControlEncoder.for_unet(unet, factor=self.factor, interpolation=interpolation)

    def _copy_of(self, unet: nn.Module, **options: bool) -> ControlNetModel:
        """A ControlNet that begins as this UNet, with a stem for the autoencoder's factor."""
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=self.widths, **options)

    def _plan_controlnet(self, unet: nn.Module) -> ControlNetModel:
        """The ControlNet to train, without weights. Raises `InputError` for one that does not fit the UNet."""
        path = self.options.control.controlnet_model_name_or_path
        fits = self._copy_of(unet, load_weights_from_unet=False)
        if path is None:
            return fits
        with self._reading_controlnet():
            controlnet = ControlNetModel.from_config(ControlNetModel.load_config(path))
        for name in FITTING:
            if controlnet.config[name] != fits.config[name]:
                raise InputError(
                    f"--controlnet_model_name_or_path {path}: has {name} {controlnet.config[name]}, needs that of the "
                    f"UNet, {fits.config[name]}"
                )
        stems = (each.config.conditioning_embedding_out_channels for each in (controlnet, fits))
        factor, needed = (2 ** (len(widths) - 1) for widths in stems)
        if factor != needed:
            raise InputError(
                f"--controlnet_model_name_or_path {path}: makes a side {factor} times smaller, and the autoencoder "
                f"{needed} times"
            )
        return controlnet

    def _load_controlnet(self) -> ControlNetModel:
        path = self.options.control.controlnet_model_name_or_path
        unet = self.family.pipe.unet
        with torch.random.fork_rng(devices=[]):  # made on the CPU
            torch.manual_seed(self.options.run.seed)
            if path is None:
                return self._copy_of(unet).to(unet.dtype)
            with self._reading_controlnet():
                return ControlNetModel.from_pretrained(path, dtype=unet.dtype)

    @contextmanager
    def _reading_controlnet(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            path = self.options.control.controlnet_model_name_or_path
            raise InputError(
                f"--controlnet_model_name_or_path {path}: cannot be read as a ControlNet: {error}"
            ) from error


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def merged(controlnet: ControlNetModel) -> ControlNetModel:
    """A copy of a ControlNet with its adapter merged into the weights, as a stock model."""
    plain = copy.deepcopy(controlnet)
    if getattr(plain, "peft_config", None):
        from diffusers.utils.peft_utils import recurse_remove_peft_layers

        for module in plain.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge(adapter_names=[ADAPTER_NAME])
        recurse_remove_peft_layers(plain)
        del plain.peft_config
    return plain.requires_grad_(False)


def run(options: Options, command: str) -> TrainingResult:
    """Train, then save, generate and describe what was learned. Raises InputError before anything heavy is loaded."""
    training = ControlRun(options, command)
    images = ControlImages(
        find_pairs(options.data, seed=options.run.seed),
        interpolation=options.control.conditioning_interpolation,
        proportion_empty_prompts=options.data.proportion_empty_prompts,
        **training.view_options,
    )
    training.check_images(images)
    flag = "train_data_dir" if options.data.dataset_name is None else "dataset_name"
    training.check(epoch_samples=len(images), depends_on={flag: images.fingerprint})
    prompts = [prompt for _, prompt in training.validation_pairs]
    training.load(prompts)
    result = training.train(training.objective(images), images.describe())
    training.finish(result, prompt=prompts[0], images=images.describe())
    return result


def main(arguments: Sequence[str] | None = None) -> TrainingResult:
    return run_script(run, Options, script="train_controlnet_ether.py", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
