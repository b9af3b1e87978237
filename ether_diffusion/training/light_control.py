"""Light control: an encoder beside the adapters of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ether_diffusion.errors import InputError
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Attached
from ether_diffusion.training.card import opening
from ether_diffusion.training.control_adaptation import ControlAdaptation, drawing_from
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs
from ether_diffusion.training.options import ControlTrainingOptions


class LightControl(ControlAdaptation):
    """Adapters on the pipeline as in every training, and an encoder whose features are added to those of the UNet.

    Source: ETHER, arXiv:2405.20271, section 5.1.2.
    """

    inputs = "control_image=control"
    control, objective = objectives.ENCODER, objectives.LightControlObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        if "unet" not in blueprint.models:
            raise InputError(
                f"{self.family_class.pipeline_class}: control is trained for pipelines with a UNet, such as "
                "StableDiffusionPipeline and StableDiffusionXLPipeline"
            )
        with torch.device("meta"):
            self.planned_encoder = self.make_encoder(blueprint.models["unet"])
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
