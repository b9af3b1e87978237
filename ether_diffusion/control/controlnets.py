"""ControlNets by kind of denoiser: how one begins as a copy, which ones fit, and what in them is trained as it is."""

from __future__ import annotations

import copy
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline, FluxControlNetModel, ModelMixin, SD3ControlNetModel
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.control.pipelines import over, stock_class
from ether_diffusion.errors import InputError
from ether_diffusion.tokens import PATCH

ZEROS = {"num_double_layers": "controlnet_blocks", "num_single_layers": "controlnet_single_blocks"}
"""Flag of a number of layers -> the part of a ControlNet that has one layer for each of them."""
TEXT_ALONE = r"attn\.(add_q_proj|to_add_out|norm_added_q)|ff_context\..*"
"""Layers of a block with streams for image and text of which only the text's answer is made."""


class ControlNets(ABC):
    """The ControlNets of one denoiser.

    Args:
        denoiser: may have no weights.
        factor: how many times smaller the ControlNet's features are than a side in pixels.
        layers: flag -> how many layers are copied, where that can be chosen; None for the usual number.

    Class attributes:
        model_class: of the ControlNet.
        own_modules: parts that begin at zero or at random, so they are trained as they are.
        fitting: what its config must have in common with the denoiser's.
        takes_latents: whether it reads latents of the control image, and not the image.
        argument: of the pipeline that takes control images.
        what: the denoiser, in words.

    Raises:
        InputError: layers that the denoiser does not have, or would not use.
    """

    model_class: ClassVar[type[ModelMixin]]
    own_modules: ClassVar[Sequence[str]]
    fitting: ClassVar[Sequence[str]]
    takes_latents: ClassVar[bool] = True
    argument: ClassVar[str] = "control_image"
    what: ClassVar[str] = "transformer"
    layer_flags: ClassVar[Mapping[str, tuple[str, int]]] = {}
    """Flag -> the field of the config with the number of layers, and how many are copied by default."""

    def __init__(self, denoiser: nn.Module, factor: int, layers: Mapping[str, int | None] | None = None):
        self.denoiser, self.factor = denoiser, factor
        self.layers: dict[str, int] = {}
        for flag, count in (layers or {}).items():
            if flag not in self.layer_flags and count is not None:
                raise InputError(f"--{flag}: has no effect on a {self.model_class.__name__}")

    @classmethod
    def layers_in(cls, names: Iterable[str]) -> dict[str, int]:
        """Flag -> how many layers a ControlNet has, by the names of its parameters."""
        return {}

    def own_names(self, controlnet: nn.Module) -> list[str]:
        """Names of those parts that begin at zero or at random; some ControlNets have not all of them."""
        return [name for name in self.own_modules if any(True for _ in getattr(controlnet, name).parameters())]

    @abstractmethod
    def copy_of(self, denoiser: nn.Module, *, load_weights: bool = True) -> ModelMixin:
        """A ControlNet that begins as this denoiser."""

    def check(self, controlnet: ModelMixin, given: str, side: int) -> None:
        """Make sure that a ControlNet fits the denoiser.

        Args:
            controlnet: may have no weights.
            given: the flag and value that it comes from.
            side: the longest of the training images, in pixels.

        Raises:
            InputError: it does not fit; says what would.
        """
        fits = self.copy_of(self.denoiser, load_weights=False)
        for name in self.fitting:
            has, needed = (_plain(each.config[name]) for each in (controlnet, fits))
            if has != needed:
                raise InputError(f"{given}: has {name} {has}, needs that of the {self.what}, {needed}")

    def unused(self, controlnet: nn.Module) -> list[nn.Module]:
        """Parts on which nothing depends; they need no gradients, and data parallel training refuses them."""
        return []


class UNetControlNets(ControlNets):
    """A copy of the UNet's first half, and a stem that reads the control image.

    Source: ControlNet, arXiv:2302.05543.
    """

    model_class = ControlNetModel
    own_modules = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding")
    fitting = (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )
    takes_latents = False
    argument = "image"
    what = "UNet"

    def copy_of(self, denoiser: nn.Module, *, load_weights: bool = True) -> ModelMixin:
        # As many steps down as the encoder has: either brings a control image to the size of the latents.
        widths = ControlEncoder.for_denoiser(denoiser, factor=self.factor).config.block_out_channels
        return ControlNetModel.from_unet(
            denoiser, conditioning_embedding_out_channels=widths, load_weights_from_unet=load_weights
        )

    def check(self, controlnet: ModelMixin, given: str, side: int) -> None:
        super().check(controlnet, given, side)
        factor = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
        if factor != self.factor:
            raise InputError(f"{given}: makes a side {factor} times smaller, and the autoencoder {self.factor} times")


class TransformerControlNets(ControlNets):
    """A copy of a transformer's first blocks, which reads latents of the control image beside the noisy ones."""

    def __init__(self, denoiser: nn.Module, factor: int, layers: Mapping[str, int | None] | None = None):
        super().__init__(denoiser, factor, layers)
        for flag, (name, usual) in self.layer_flags.items():
            asked, blocks = (layers or {}).get(flag), denoiser.config[name]
            fits = [count for count in range(blocks + 1) if self.used(name, count) == count]
            if asked is not None and asked not in fits:
                raise InputError(
                    f"--{flag}: got {asked}; of the transformer's {blocks} blocks, {', '.join(map(str, fits))} fit, "
                    "all of which it would use"
                )
            self.layers[flag] = max(count for count in fits if count <= usual) if asked is None else asked
        if not any(self.layers.values()):
            flags = ", ".join(f"--{flag}" for flag in self.layers)
            raise InputError(f"{flags}: got 0; a {self.model_class.__name__} needs a block at least")

    @classmethod
    def layers_in(cls, names: Iterable[str]) -> dict[str, int]:
        blocks = {tuple(name.split(".")[:2]) for name in names}
        return {flag: sum(module == ZEROS[flag] for module, *_ in blocks) for flag in cls.layer_flags}

    def used(self, name: str, count: int) -> int:
        """How many of the answers of a ControlNet's blocks the transformer adds to those of its own.

        Args:
            name: of the config's field with the number of these blocks.
            count: of the ControlNet's.
        """
        raise NotImplementedError

    def copy_of(self, denoiser: nn.Module, *, load_weights: bool = True) -> ModelMixin:
        # Diffusers writes the ControlNet's numbers into the config that it is given, so it gets its own, without
        # what a ControlNet does not know, such as the list of values that no file stated, which would be lost.
        source, known = copy.copy(denoiser), inspect.signature(self.model_class.__init__).parameters
        source._internal_dict = FrozenDict({name: v for name, v in denoiser.config.items() if name in known})
        layers = {name: self.layers[flag] for flag, (name, _) in self.layer_flags.items()}
        return self.model_class.from_transformer(
            source, **layers, **self.arguments, load_weights_from_transformer=load_weights
        )

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What a copy is made with, besides the numbers of layers."""
        return {}

    def unused(self, controlnet: nn.Module) -> list[nn.Module]:
        used = {name: self.used(name, controlnet.config[name]) for name, _ in self.layer_flags.values()}
        doubles, singles = used["num_layers"], used.get("num_single_layers", 0)
        idle = [*controlnet.controlnet_blocks[doubles:]]
        if singles:
            idle += [*controlnet.controlnet_single_blocks[singles:], *controlnet.single_transformer_blocks[singles:]]
        else:  # after the last block whose image is used, the text has no effect
            idle += controlnet.transformer_blocks[doubles:]
            last = controlnet.transformer_blocks[doubles - 1].named_modules()
            idle += [module for name, module in last if re.fullmatch(TEXT_ALONE, name)]
        return idle


class SD3ControlNets(TransformerControlNets):
    """Source: its ControlNets and their pipeline in diffusers."""

    model_class = SD3ControlNetModel
    own_modules = ("controlnet_blocks", "pos_embed_input")
    fitting = ("in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "pooled_projection_dim")
    layer_flags = {"num_double_layers": ("num_layers", 12)}
    arguments = {"num_extra_conditioning_channels": 0}

    def used(self, name: str, count: int) -> int:
        blocks = self.denoiser.config[name]  # the last of them takes no answer
        return int((blocks - 2) / (blocks / count)) + 1 if count and blocks > 1 else 0

    def check(self, controlnet: ModelMixin, given: str, side: int) -> None:
        super().check(controlnet, given, side)
        config = controlnet.config
        if extra := config.extra_conditioning_channels:
            raise InputError(f"{given}: reads {extra} channels besides the control image, needs one that reads none")
        width, needed = config.joint_attention_dim, self.denoiser.config.joint_attention_dim
        if width not in (None, needed):
            raise InputError(f"{given}: has joint_attention_dim {width}, needs that of the {self.what}, {needed}")
        positions = side // self.factor
        if config.use_pos_embed and positions > config.pos_embed_max_size:
            most = config.pos_embed_max_size * self.factor
            raise InputError(f"{given}: takes sides of up to {most} pixels, and --resolution is {side}")


class FluxControlNets(TransformerControlNets):
    """Source: its ControlNets and their pipeline in diffusers."""

    model_class = FluxControlNetModel
    own_modules = ("controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")
    fitting = (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    )
    layer_flags = {"num_double_layers": ("num_layers", 4), "num_single_layers": ("num_single_layers", 4)}

    @property
    def arguments(self) -> Mapping[str, Any]:
        return {name: self.denoiser.config[name] for name in ("attention_head_dim", "num_attention_heads")}

    def used(self, name: str, count: int) -> int:
        blocks = self.denoiser.config[name]
        return math.ceil(blocks / math.ceil(blocks / count)) if count and blocks else 0

    def check(self, controlnet: ModelMixin, given: str, side: int) -> None:
        super().check(controlnet, given, side)
        if controlnet.config.num_mode is not None:
            raise InputError(f"{given}: is a union of several kinds of control, needs one of a single kind")
        if controlnet.config.conditioning_embedding_channels is not None:
            raise InputError(f"{given}: has a stem that reads the image itself, needs one that reads its latents")


def _plain(value: Any) -> Any:
    """A value of a config, whether it comes from a file or from a class."""
    return list(value) if isinstance(value, (list, tuple)) else value


CONTROLNETS: dict[str, tuple[str, type[ControlNets]]] = {
    "StableDiffusionPipeline": ("StableDiffusionControlNetPipeline", UNetControlNets),
    "StableDiffusionXLPipeline": ("StableDiffusionXLControlNetPipeline", UNetControlNets),
    "StableDiffusion3Pipeline": ("StableDiffusion3ControlNetPipeline", SD3ControlNets),
    "FluxPipeline": ("FluxControlNetPipeline", FluxControlNets),
}
"""Stock pipeline -> the one with a ControlNet, and its ControlNets."""


def controlnets_for(pipeline_class: str) -> type[ControlNets] | None:
    """The ControlNets of a stock pipeline, by its name; None where it has none."""
    return CONTROLNETS[pipeline_class][1] if pipeline_class in CONTROLNETS else None


def with_controlnet(pipe: DiffusionPipeline, controlnet: nn.Module) -> DiffusionPipeline:
    """The stock pipeline with a ControlNet over the components of a pipeline without one."""
    name, _ = CONTROLNETS[stock_class(pipe).__name__]
    return over(getattr(diffusers, name), pipe, controlnet=controlnet)


def start_noise(pipe: DiffusionPipeline, count: int, size: tuple[int, int], generator: Any) -> dict[str, Any]:
    """What a pipeline is told besides, to start from the noise that it would start from without a ControlNet.

    That of FLUX.1 would draw the latents of the control images first.

    Args:
        pipe: any.
        count: images.
        size: their height and width.
        generator: of the noise, one or one for each.
    """
    if type(pipe).__name__ != "FluxControlNetPipeline":
        return {}
    channels, device = pipe.transformer.config.in_channels // PATCH**2, torch.device(pipe._execution_device)
    return {"latents": pipe.prepare_latents(count, channels, *size, pipe.transformer.dtype, device, generator)[0]}
