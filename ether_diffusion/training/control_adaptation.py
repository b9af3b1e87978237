"""What control training trains: a light encoder beside the adapters of the pipeline, or an adapted ControlNet."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.errors import InputError
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Adaptation, Attached
from ether_diffusion.training.card import opening
from ether_diffusion.training.checkpoints import with_fingerprint
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.configs import Method, configs_of
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs, add_adapters, dry_run
from ether_diffusion.training.options import CONTROL_LEARNING_RATE, NO_METHOD, ControlTrainingOptions, parse_range

STEM_AND_ZEROS = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding")
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


class ControlAdaptation(Adaptation[ControlTrainingOptions]):
    """What both kinds of control have in common: `control`, with a learning rate of its own, beside the method.

    Class attributes:
        control: name of the encoder or the ControlNet among the models.
        objective: what is minimised.
    """

    tags = ("controlnet",)
    control: str
    objective: type[objectives.DenoisingObjective]

    def __init__(self, options: ControlTrainingOptions, method: Method, family: type[Family], blueprint: Blueprint):
        if "unet" not in blueprint.models:
            raise InputError(
                f"{family.pipeline_class}: control is trained for pipelines with a UNet, such as "
                "StableDiffusionPipeline and StableDiffusionXLPipeline"
            )
        self.factor = blueprint.resolution_multiple
        self.interpolation = options.control.conditioning_interpolation
        self.value_range = parse_range(options.control.conditioning_range)
        self.path = options.control.controlnet_model_name_or_path
        self.given = f"--controlnet_model_name_or_path {self.path}"
        with torch.device("meta"):
            self.planned_encoder = self.make_encoder(blueprint.models["unet"])
        super().__init__(options, method, family, blueprint)

    @property
    def one_file(self) -> bool:
        """Whether one file holds all that was trained."""
        return self.method.layout == "ether" or self.method.name == NO_METHOD

    @property
    def folders(self) -> Collection[str]:
        return (self.control,)

    @property
    def default_learning_rate(self) -> float | None:
        return CONTROL_LEARNING_RATE if self.method.name == NO_METHOD else super().default_learning_rate

    def resolve(
        self, options: ControlTrainingOptions, accelerator: Accelerator, *, epoch_samples: int
    ) -> ControlTrainingOptions:
        optimization, control = options.optimization, options.control
        if optimization.optimizer == "prodigy" and control.control_lr != CONTROL_LEARNING_RATE:
            raise InputError(f"--control_lr: got {control.control_lr:g}, --optimizer prodigy takes one learning rate")
        if not self.configs and optimization.optimizer != "prodigy" and optimization.learning_rate is not None:
            raise InputError("--learning_rate: has no effect with --method none; use --control_lr")
        if optimization.scale_lr:
            rate = control.control_lr * optimization.samples_per_step(accelerator.num_processes)
            options = replace(options, control=replace(control, control_lr=rate))
        return super().resolve(options, accelerator, epoch_samples=epoch_samples)

    def modules_trained_as_they_are(self, control: nn.Module) -> list[nn.Module]:
        """What is trained besides the method."""
        return [control]

    def parameter_groups(self, attached: Attached, options: ControlTrainingOptions) -> list[dict[str, Any]]:
        """The method's parameters as in every run, and what else is trained, with a rate of its own."""
        rate = options.control.control_lr
        if options.optimization.optimizer == "prodigy":
            rate = options.optimization.learning_rate
        modules = self.modules_trained_as_they_are(attached.models[self.control])
        own = [each for module in modules for each in module.parameters() if each.requires_grad]
        groups = []
        if self.configs:
            # Where all weights of a ControlNet are trained, the method's are those that are left.
            taken = {id(each) for each in own}
            adapted = replace(attached, models={name: attached.models[name] for name in self.configs})
            for group in super().parameter_groups(adapted, options):
                groups.append({**group, "params": [each for each in group["params"] if id(each) not in taken]})
        return [*groups, {"params": own, "lr": rate, "name": "control"}]

    def showing(self, note: str = "") -> list[str]:
        """Lines of the card's code that read a control image; the note says more of it."""
        if self.value_range is not None:  # diffusers' own reader would clip the values at 255
            return [
                "from ether_diffusion.images import read_image",
                f'control = read_image("map.png", value_range={self.value_range})  # the control image{note}',
            ]
        return [
            "from diffusers.utils import load_image",
            f'control = load_image("map.png")  # the control image{note}',
        ]

    def make_encoder(self, unet: nn.Module) -> ControlEncoder:
        """An encoder for this UNet, its weights drawn from the global random numbers."""
        return ControlEncoder.for_unet(
            unet, factor=self.factor, interpolation=self.interpolation, value_range=self.value_range
        )


class LightControl(ControlAdaptation):
    """Adapters on the pipeline as in every training, and an encoder whose features are added to those of the UNet.

    Source: ETHER, arXiv:2405.20271, section 5.1.2.
    """

    inputs = "control_image=control"
    control, objective = objectives.ENCODER, objectives.LightControlObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        configs, count = super().plan(options, blueprint)
        return configs, count + self.planned_encoder.num_parameters()

    def attach(self, family: Family, options: ControlTrainingOptions) -> Attached:
        # Before there are adapters, which are float32 in every precision; without a dtype, all would become float32.
        pipe = family.light_control_pipeline_class.from_pipe(family.pipe, dtype=family.pipe.unet.dtype)
        models = super().attach(family, options).models
        with drawing_from(options.run.seed):
            encoder = self.make_encoder(family.pipe.unet).to(family.device)
        pipe.add_control(ADAPTER_NAME, encoder)
        return Attached(pipe, {**models, self.control: encoder})

    def save(self, attached: Attached, family: Family, folder: Path, metadata: Mapping[str, str]) -> Path:
        """One file with ETHER or with the encoder alone; another method as in every run, the encoder beside it."""
        if self.one_file:
            return attached.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata)
        attached.models[self.control].save_pretrained(folder / self.control)
        return super().save(attached, family, folder, metadata)

    def loading_code(self, attached: Attached, source: ModelSource) -> str:
        kind = type(attached.pipe)
        if self.one_file:
            return "\n".join([*self.showing(), opening(source, kind), "pipe.load_ether_weights({where})"])
        if self.method.layout == "full":
            opened = [f"from ether_diffusion import {kind.__name__}"]
            opened += [f"pipe = {kind.__name__}.from_pretrained({{where}})"]
        else:
            opened = [opening(source, kind), super().loading_code(attached, source)]
        lines = [
            "from ether_diffusion import ControlEncoder",
            f'encoder = ControlEncoder.from_pretrained({{where}}, subfolder="{self.control}")',
            'pipe.add_control("control", encoder)',
        ]
        return "\n".join([*self.showing(), *opened, *lines])


class ControlNetAdaptation(ControlAdaptation):
    """A ControlNet, by default a copy of the UNet's first half, under the method; the pipeline stays as it is."""

    inputs = "image=control"
    can_shard = False
    control, objective = objectives.CONTROLNET, objectives.ControlNetObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        configs = configs_of(self.method, self.family_class, options.adapter)
        with torch.device("meta"):
            controlnet = self._plan_controlnet(blueprint.models["unet"])
        configs = {self.control: configs["unet"]} if "unet" in configs else {}
        count = dry_run({self.control: controlnet}, configs)
        if configs.get(self.control, "none") is None:  # every weight is trained, these as well
            return configs, count
        own = self.modules_trained_as_they_are(controlnet)
        return configs, count + sum(each.numel() for module in own for each in module.parameters())

    @property
    def deep(self) -> Collection[str]:
        return {self.control}

    @property
    def denoiser(self) -> str:
        return self.control

    def resolve(
        self, options: ControlTrainingOptions, accelerator: Accelerator, *, epoch_samples: int
    ) -> ControlTrainingOptions:
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise InputError(
                "--mixed_precision fp16: --control_type controlnet needs a GPU for it (on a CPU, autocast leaves "
                "convolutions in the precision of their weights); use bf16 or no"
            )
        return super().resolve(options, accelerator, epoch_samples=epoch_samples)

    def depends_on(self) -> Mapping[str, str]:
        if self.path is None:
            return {}
        return {"controlnet_model_name_or_path": with_fingerprint(self.path, self.path)}

    def modules_trained_as_they_are(self, control: nn.Module) -> list[nn.Module]:
        return [getattr(control, name) for name in STEM_AND_ZEROS]

    def attach(self, family: Family, options: ControlTrainingOptions) -> Attached:
        dtype = family.pipe.unet.dtype
        with drawing_from(options.run.seed):
            controlnet = self._load_controlnet(family.pipe.unet)
        controlnet.to(family.device).requires_grad_(False)
        pipe = family.controlnet_pipeline_class.from_pipe(family.pipe, controlnet=controlnet, dtype=dtype)
        models = {self.control: controlnet}
        add_adapters({name: models[name] for name in self.configs}, self.configs, seed=options.run.seed)
        for module in self.modules_trained_as_they_are(controlnet):
            module.float().requires_grad_(True)
        return Attached(pipe, models)

    @contextmanager
    def generating(self, attached: Attached, dtype: torch.dtype) -> Iterator[None]:
        """The ControlNet's calls in this precision, whatever that of its weights; float32 leaves them as they are.

        Of this model alone: the autoencoder of SDXL, for one, overflows in float16.
        """
        controlnet = attached.models[self.control]
        if dtype == torch.float32:
            yield
            return
        controlnet.forward = torch.autocast(controlnet.device.type, dtype)(controlnet.forward)
        try:
            yield
        finally:
            del controlnet.forward

    def save(self, attached: Attached, family: Family, folder: Path, metadata: Mapping[str, str]) -> Path:
        """The merged ControlNet as a folder, and with ETHER or no method one file besides."""
        if self.one_file:
            modules = {self.control: list(STEM_AND_ZEROS)}
            attached.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata, replaced_modules=modules)
        merged(attached.models[self.control]).save_pretrained(folder / self.control)
        return folder / self.control

    def loading_code(self, attached: Attached, source: ModelSource) -> str:
        stock = ", at the size of the result: stock pipelines smooth what they resize (Lanczos)"
        lines = [
            *self.showing(stock if self.interpolation == "nearest" else ""),
            "from diffusers import ControlNetModel",
            f'controlnet = ControlNetModel.from_pretrained({{where}}, subfolder="{self.control}")',
            opening(source, type(attached.pipe), "controlnet=controlnet"),
        ]
        return "\n".join(lines)

    def _copy_of(self, unet: nn.Module, **options: bool) -> ControlNetModel:
        """A ControlNet that begins as this UNet."""
        # As many steps down as the encoder has: either brings a control image to the size of the latents.
        widths = self.planned_encoder.config.block_out_channels
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths, **options)

    def _plan_controlnet(self, unet: nn.Module) -> ControlNetModel:
        """The ControlNet to train, without weights. Raises `InputError` for one that does not fit the UNet."""
        fits = self._copy_of(unet, load_weights_from_unet=False)
        if self.path is None:
            return fits
        with self._reading():
            controlnet = ControlNetModel.from_config(ControlNetModel.load_config(self.path))
        for name in FITTING:
            given, needed = controlnet.config[name], fits.config[name]
            if given != needed:
                raise InputError(f"{self.given}: has {name} {given}, needs that of the UNet, {needed}")
        stems = (each.config.conditioning_embedding_out_channels for each in (controlnet, fits))
        factor, needed = (2 ** (len(widths) - 1) for widths in stems)
        if factor != needed:
            raise InputError(f"{self.given}: makes a side {factor} times smaller, and the autoencoder {needed} times")
        return controlnet

    def _load_controlnet(self, unet: nn.Module) -> ControlNetModel:
        if self.path is None:
            return self._copy_of(unet).to(unet.dtype)
        with self._reading():
            return ControlNetModel.from_pretrained(self.path, dtype=unet.dtype)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.given}: cannot be read as a ControlNet: {error}") from error


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Global random numbers from this seed, for what is made on the CPU; afterwards they go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def merged(controlnet: ControlNetModel) -> ControlNetModel:
    """A copy of a ControlNet with its adapter merged into the weights, as a stock model."""
    plain = copy.deepcopy(controlnet)
    if getattr(plain, "peft_config", None):
        for module in plain.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge(adapter_names=[ADAPTER_NAME])
        recurse_remove_peft_layers(plain)
        del plain.peft_config
    return plain.requires_grad_(False)
