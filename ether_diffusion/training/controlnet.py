"""Control by an adapted ControlNet."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Attached
from ether_diffusion.training.card import opening
from ether_diffusion.training.checkpoints import with_fingerprint
from ether_diffusion.training.control_adaptation import ControlAdaptation, drawing_from
from ether_diffusion.training.families import Blueprint, Family, ModelSource
from ether_diffusion.training.methods.configs import configs_of
from ether_diffusion.training.methods.injection import ADAPTER_NAME, Configs, add_adapters, dry_run
from ether_diffusion.training.options import ControlTrainingOptions

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


class ControlNetAdaptation(ControlAdaptation):
    """A ControlNet, by default a copy of the UNet's first half, under the method; the pipeline stays as it is."""

    inputs = "image=control"
    can_shard = False
    control, objective = objectives.CONTROLNET, objectives.ControlNetObjective

    def plan(self, options: ControlTrainingOptions, blueprint: Blueprint) -> tuple[Configs, int]:
        if "unet" not in blueprint.models:
            raise InputError(
                f"{self.family_class.pipeline_class}: --control_type controlnet is trained for pipelines with a UNet, "
                "such as StableDiffusionPipeline and StableDiffusionXLPipeline; --control_type light fits here"
            )
        configs = configs_of(self.method, self.family_class, options.adapter)
        with torch.device("meta"):
            self.planned_encoder = self.make_encoder(blueprint.models["unet"])
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
