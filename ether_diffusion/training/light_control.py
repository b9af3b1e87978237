"""Light control: an encoder beside the adapters of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ether_diffusion.control.classes import CONTROL_PIPELINES, control_pipeline_class
from ether_diffusion.control.encoder import AnyEncoder, LatentControlEncoder
from ether_diffusion.control.pipelines import over
from ether_diffusion.errors import InputError
from ether_diffusion.files import new_entries
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Attached
from ether_diffusion.training.card import opening
from ether_diffusion.training.control_adaptation import ControlAdaptation, drawing_from
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs
from ether_diffusion.training.options import ControlTrainingOptions


class LightControl(ControlAdaptation):
    """Adapters on the pipeline as in every training, and an encoder whose features are added to those of the denoiser.

    Source: ETHER, arXiv:2405.20271, section 5.1.2.
    """

    inputs = "control_image=control"
    control, objective = objectives.ENCODER, objectives.LightControlObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        name, family = self.family_class.pipeline_class, self.family_class
        if name not in CONTROL_PIPELINES:
            editor = "; as an editor it takes images itself: --reference_dir of the DreamBooth script"
            raise InputError(
                f"{name}: light control is trained for {', '.join(CONTROL_PIPELINES)}"
                f"{editor if family.takes_references else ''}"
            )
        self.kind = options.control.control_encoder or self.default_kind
        if self.kind == "latent" and not family.is_flow:
            raise InputError("--control_encoder latent: needs a transformer; a UNet's first convolution takes conv")
        with torch.device("meta"):
            self.planned_encoder = self.make_encoder(blueprint.models[family.denoiser])
        self.second = objectives.CONTROL_LATENTS if self.kind == "latent" else objectives.CONTROL_IMAGE
        configs, count = super().plan(options, blueprint)
        return configs, count + self.planned_encoder.num_parameters()

    @property
    def default_kind(self) -> str:
        """Of the encoder, where none is asked for."""
        return "latent" if self.family_class.is_flow else "conv"

    def make_encoder(self, denoiser: nn.Module) -> AnyEncoder:
        if self.kind == "conv":
            return super().make_encoder(denoiser)
        reading = {"interpolation": self.interpolation, "value_range": self.value_range}
        return LatentControlEncoder.for_denoiser(denoiser, **reading)

    def resolve(
        self, options: ControlTrainingOptions, accelerator: Accelerator, *, epoch_samples: int
    ) -> ControlTrainingOptions:
        # The default by its name is as none at all, so that a run goes on under either, and one of an earlier release.
        kind = None if self.kind == self.default_kind else self.kind
        options = replace(options, control=replace(options.control, control_encoder=kind))
        return super().resolve(options, accelerator, epoch_samples=epoch_samples)

    def attach(self, family: Family, options: ControlTrainingOptions) -> Attached:
        # The family's own from now on: it brings components in and out of memory.
        family.pipe = over(control_pipeline_class(family.pipeline_class), family.pipe)
        models = super().attach(family, options).models
        with drawing_from(options.run.seed):
            encoder = self.make_encoder(family.component(family.denoiser)).to(family.device)
        family.pipe.add_control(ADAPTER_NAME, encoder)
        return Attached(family.pipe, {**models, self.control: encoder})

    def save(self, attached: Attached, family: Family, folder: Path, metadata: Mapping[str, str]) -> Path:
        """One file with ETHER or with the encoder alone; another method as in every run, the encoder beside it."""
        if self.one_file:
            return attached.pipe.save_ether_weights(folder, ADAPTER_NAME, metadata=metadata)
        with new_entries(folder) as partial:
            attached.models[self.control].save_pretrained(partial / self.control)
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
        encoder = type(attached.models[self.control]).__name__
        lines = [
            f"from ether_diffusion import {encoder}",
            f'encoder = {encoder}.from_pretrained({{where}}, subfolder="{self.control}")',
            'pipe.add_control("control", encoder)',
        ]
        return "\n".join([*self.showing(), *opened, *lines])
