"""Control by an adapted ControlNet."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.schema import MAX_WEIGHTS
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.control.controlnets import CONTROLNETS, ZEROS, ControlNets, controlnets_for, with_controlnet
from ether_diffusion.errors import InputError
from ether_diffusion.files import new_entries
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Attached
from ether_diffusion.training.card import opening
from ether_diffusion.training.checkpoints import with_fingerprint
from ether_diffusion.training.control_adaptation import ControlAdaptation, drawing_from
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.configs import configs_of
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs, add_adapters, dry_run
from ether_diffusion.training.options import ControlTrainingOptions


class ControlNetAdaptation(ControlAdaptation):
    """A ControlNet, by default a copy of the denoiser's first layers, under the method; the base stays as it is."""

    can_shard = False
    control, objective = objectives.CONTROLNET, objectives.ControlNetObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        self.nets = self._kind(options, blueprint)
        if self.nets.takes_latents:
            self.second = objectives.CONTROL_LATENTS
        self.inputs = f"{self.nets.argument}=control"
        if self.path is None and options.performance.quantize:
            raise InputError(
                f"--quantize {options.performance.quantize}: a ControlNet begins as a copy of the weights, which it "
                "needs whole; drop it, or name a --controlnet_model_name_or_path"
            )
        configs = configs_of(self.method, self.family_class, options.adapter)
        side = max(side for target in blueprint.targets(options.views) for side in target)
        with torch.device("meta"):
            controlnet = self._plan_controlnet(side)
        self.beside = {self.control: controlnet}
        modules = self.modules_trained_as_they_are(controlnet)
        own = sum(each.numel() for module in modules for each in module.parameters())
        self._fits_one_file = own <= MAX_WEIGHTS
        denoiser = self.family_class.denoiser
        if denoiser not in configs:
            return {}, own
        config = configs[denoiser]
        if config is not None and options.adapter.target_modules is None:
            _keep_present(config, self.family_class.targets, controlnet)
        count = dry_run({self.control: controlnet}, {self.control: config})
        # Where every weight is trained, these are among them.
        return {self.control: config}, count if config is None else count + own

    @property
    def one_file(self) -> bool:
        return super().one_file and self._fits_one_file

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
        if self.path is None:  # the defaults by their numbers, so that a run goes on under either
            options = replace(options, control=replace(options.control, **self.nets.layers))
        return super().resolve(options, accelerator, epoch_samples=epoch_samples)

    def depends_on(self) -> Mapping[str, str]:
        if self.path is None:
            return {}
        return {"controlnet_model_name_or_path": with_fingerprint(self.path, self.path)}

    def modules_trained_as_they_are(self, control: nn.Module) -> list[nn.Module]:
        return [getattr(control, name) for name in self.nets.own_names(control)]

    def attach(self, family: Family, options: ControlTrainingOptions) -> Attached:
        denoiser = family.component(family.denoiser)
        with drawing_from(options.run.seed):
            controlnet = self._load_controlnet(denoiser)
        controlnet.to(family.device).eval().requires_grad_(False)
        # The family's own from now on: it brings components in and out of memory.
        family.pipe = with_controlnet(family.pipe, controlnet)
        add_adapters({name: controlnet for name in self.configs}, self.configs, seed=options.run.seed)
        for module in self.modules_trained_as_they_are(controlnet):
            module.float().requires_grad_(True)
        for module in self.nets.unused(controlnet):
            module.requires_grad_(False)
        return Attached(family.pipe, {self.control: controlnet})

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
            modules = {self.control: self.nets.own_names(attached.models[self.control])}
            attached.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata, replaced_modules=modules)
        with new_entries(folder) as partial:
            merged(attached.models[self.control]).save_pretrained(partial / self.control)
        return folder / self.control

    def loading_code(self, attached: Attached, source: ModelSource) -> str:
        stock = ", at the size of the result: stock pipelines smooth what they resize (Lanczos)"
        kind = self.nets.model_class.__name__
        lines = [
            *self.showing(stock if self.interpolation == "nearest" else ""),
            f"from diffusers import {kind}",
            f'controlnet = {kind}.from_pretrained({{where}}, subfolder="{self.control}")',
            opening(source, type(attached.pipe), "controlnet=controlnet"),
        ]
        return "\n".join(lines)

    def _kind(self, options: ControlTrainingOptions, blueprint: Blueprint) -> ControlNets:
        """The ControlNets of the base. Raises `InputError` where it has none, or not with so many layers."""
        family = self.family_class
        kind = controlnets_for(family.pipeline_class)
        if kind is None:
            light = "; --control_type light fits here" if family.pipeline_class in CONTROL_PIPELINES else ""
            raise InputError(f"{family.pipeline_class}: ControlNets are trained for {', '.join(CONTROLNETS)}{light}")
        layers = {flag: getattr(options.control, flag) for flag in ZEROS}
        return kind(blueprint.models[family.denoiser], self.factor, layers)

    def _plan_controlnet(self, side: int) -> ModelMixin:
        """The ControlNet to train, without weights. Raises `InputError` for one that does not fit the denoiser.

        side: the longest of the training images, in pixels.
        """
        if self.path is None:
            return self.nets.copy_of(self.nets.denoiser, load_weights=False)
        kind = self.nets.model_class
        with self._reading():
            config = kind.load_config(self.path)
            if config.get("_class_name", kind.__name__) != kind.__name__:
                raise ValueError(f"it is a {config['_class_name']}, needs a {kind.__name__}")
            controlnet = kind.from_config(config)
        self.nets.check(controlnet, self.given, side)
        return controlnet

    def _load_controlnet(self, denoiser: nn.Module) -> ModelMixin:
        if self.path is None:
            # Past `ModelMixin.to`, which logs a warning.
            return nn.Module.to(self.nets.copy_of(denoiser), denoiser.dtype)
        with self._reading():
            return self.nets.model_class.from_pretrained(self.path, dtype=denoiser.dtype)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.given}: cannot be read as a ControlNet: {error}") from error


def _keep_present(config: PeftConfig, default: Collection[str] | str, controlnet: nn.Module) -> None:
    """Of a family's default layers, those that a ControlNet has, which may lack a kind of blocks, or text."""
    targets = config.target_modules
    if isinstance(default, str) or isinstance(targets, str) or set(targets or ()) != set(default):
        return
    names = [f".{name}" for name, _ in controlnet.named_modules()]
    config.target_modules = {each for each in targets if any(name.endswith(f".{each}") for name in names)}


def merged(controlnet: ModelMixin) -> ModelMixin:
    """A copy of a ControlNet with its adapter merged into the weights, as a stock model."""
    plain = copy.deepcopy(controlnet)
    if getattr(plain, "peft_config", None):
        for module in plain.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge(adapter_names=[ADAPTER_NAME])
        recurse_remove_peft_layers(plain)
        del plain.peft_config
    if not plain.config.get("use_pos_embed", True):  # it has that of the transformer, from the pipeline
        plain.pos_embed = None
    return plain.requires_grad_(False)
