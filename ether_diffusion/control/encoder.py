"""Light control: an image (a label map, edges, a pose) steers the denoiser through one small encoder.

The encoder's features are added once, right after the denoiser's first projection. The denoiser itself is frozen;
what it does with them, reflections learn. Source: ETHER, arXiv:2405.20271, after OFT, arXiv:2306.07280.

There are two kinds. `ControlEncoder` looks at the image through small convolutions; `LatentControlEncoder` is one
linear map of the image's latents, as new columns of the first projection would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from ether_diffusion.control.kinds import ENCODER_KINDS
from ether_diffusion.control.projection import first_projection
from ether_diffusion.images import INTERPOLATIONS, rising

CONTROL = "control_encoder"
"""What files and `set_adapters` call the encoder, as they call a UNet "unet"."""
WIDTHS = (16, 32, 96, 256)


class ControlEncoder(ModelMixin, ConfigMixin):
    """From a control image to what is added after a denoiser's first projection.

    (b, 3, h, w) in [0, 1] -> (b, out_channels, h / f, w / f), f = 2 to the power of len(block_out_channels) − 1.
    The last convolution starts at zero: an encoder that nothing was taught changes no image.

    Args:
        out_channels: of the denoiser's first projection.
        conditioning_channels: of the control image.
        block_out_channels: widths on the way down; between two of them the size halves.
        interpolation: how a control image is brought to the size of the image. "nearest" keeps label maps free of
            classes that are not there, "lanczos" keeps photographs and soft edges smooth.
        value_range: (black, white) in control images of more than 8 bits, as it was stated in training; None goes by
            the mode of the image.

    Raises:
        ValueError: a width below 1, no widths, an unknown interpolation, or a range that does not rise.
    """

    takes_latents: ClassVar[bool] = False

    @register_to_config
    def __init__(
        self,
        out_channels: int,
        conditioning_channels: int = 3,
        block_out_channels: Sequence[int] = WIDTHS,
        interpolation: str = "nearest",
        value_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        widths = (out_channels, conditioning_channels, *block_out_channels)
        if not block_out_channels or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(
                f"out_channels={out_channels}, conditioning_channels={conditioning_channels}, "
                f"block_out_channels={tuple(block_out_channels)}: whole numbers from 1 fit, and at least one width"
            )
        _check_reading(interpolation, value_range)
        self.embedding = ControlNetConditioningEmbedding(
            out_channels, conditioning_channels=conditioning_channels, block_out_channels=tuple(block_out_channels)
        )
        # PyTorch's own start shrinks a signal at every layer; after seven of them the map would hardly be seen.
        for convolution in (self.embedding.conv_in, *self.embedding.blocks):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)

    @classmethod
    def for_denoiser(
        cls,
        denoiser: nn.Module,
        factor: int = 8,
        interpolation: str = "nearest",
        value_range: Sequence[float] | None = None,
    ) -> ControlEncoder:
        """A new encoder that fits a denoiser.

        Args:
            denoiser: its first projection gives the number of channels.
            factor: pixels of a side that become one feature: of a UNet a pipeline's `vae_scale_factor`; of a
                transformer those of one token, 16 in most.
            interpolation, value_range: as for the class.

        Raises:
            ValueError: a factor that is no power of two, or a model that is not known.
        """
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"factor={factor}: 1, 2, 4, 8, 16 … fit")
        steps = factor.bit_length() - 1
        widths = (*WIDTHS, *(WIDTHS[-1],) * steps)[: steps + 1]
        return cls(
            first_projection(denoiser).width,
            block_out_channels=widths,
            interpolation=interpolation,
            value_range=value_range,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was made with, as files hold it; a range of values only where one was stated."""
        names = ("out_channels", "conditioning_channels", "block_out_channels", "interpolation")
        values = {name: self.config[name] for name in names}
        values["block_out_channels"] = list(values["block_out_channels"])
        stated = self.config["value_range"]
        return values if stated is None else {**values, "value_range": list(stated)}

    @property
    def factor(self) -> int:
        """How much smaller a side of the features is than the image's."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def forward(self, control_image: Tensor) -> Tensor:
        """Encode (b, 3, h, w) in [0, 1], h and w multiples of `factor`.

        Raises:
            ValueError: another number of channels, or a size that `factor` does not divide.
        """
        channels, shape = self.config.conditioning_channels, tuple(control_image.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % self.factor or shape[3] % self.factor:
            raise ValueError(
                f"control image of shape {shape}: (b, {channels}, h, w) fits, h and w multiples of {self.factor}"
            )
        return self.embedding(control_image.to(self.dtype))


class LatentControlEncoder(ModelMixin, ConfigMixin):
    """From the latents of a control image to what is added after a transformer's first projection: E·z.

    (b, in_channels, h·p, w·p) -> (b, out_channels, h, w), p the patch. E has no bias and starts at zero: an encoder
    that nothing was taught changes no image. With the projection W of the transformer, W·x + E·z = [W | E]·(x, z): the
    concatenation of channels that FLUX.1's own control models are made with.

    Args:
        out_channels: of the transformer's first projection.
        in_channels: of latents.
        patch_size: latents of a side that become one token.
        channels_last: whether E's columns are in the order (row, column, channel) of a patch, as the projection's own
            are in some transformers; else (channel, row, column).
        interpolation, value_range: as for `ControlEncoder`.

    Raises:
        ValueError: a number below 1, an unknown interpolation, or a range that does not rise.
    """

    takes_latents: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        patch_size: int = 2,
        channels_last: bool = False,
        interpolation: str = "nearest",
        value_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        sizes = (out_channels, in_channels, patch_size)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(
                f"out_channels={out_channels}, in_channels={in_channels}, patch_size={patch_size}: whole numbers from "
                "1 fit"
            )
        _check_reading(interpolation, value_range)
        self.projection = nn.Linear(in_channels * patch_size**2, out_channels, bias=False)
        nn.init.zeros_(self.projection.weight)

    @classmethod
    def for_denoiser(
        cls, denoiser: nn.Module, interpolation: str = "nearest", value_range: Sequence[float] | None = None
    ) -> LatentControlEncoder:
        """A new encoder that fits a transformer. interpolation, value_range: as for the class.

        Raises:
            ValueError: a UNet, whose first convolution reads more than one position, or a model that is not known.
        """
        projection = first_projection(denoiser)
        if projection.is_unet:
            raise ValueError(
                f"{type(denoiser).__name__}: latents of control images are for transformers; a ControlEncoder fits"
            )
        layout = projection.layout
        return cls(
            projection.width,
            projection.channels,
            patch_size=layout.patch,
            channels_last=layout.channels_last,
            interpolation=interpolation,
            value_range=value_range,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was made with, as files hold it; a range of values only where one was stated."""
        names = ("out_channels", "in_channels", "patch_size", "channels_last", "interpolation")
        values = {name: self.config[name] for name in names}
        stated = self.config["value_range"]
        return values if stated is None else {**values, "value_range": list(stated)}

    def forward(self, latents: Tensor) -> Tensor:
        """Project latents (b, in_channels, h·p, w·p) of control images, normalised as the transformer's own are.

        Raises:
            ValueError: another number of channels, or a size that the patch does not divide.
        """
        channels, patch, shape = self.config.in_channels, self.config.patch_size, tuple(latents.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"latents of a control image of shape {shape}: (b, {channels}, h, w) fits, h and w multiples of "
                f"{patch}"
            )
        patches = nn.functional.pixel_unshuffle(latents.to(self.dtype), patch)  # (b, c·p·p, h, w)
        if self.config.channels_last:
            patches = patches.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1, 2)
        return self.projection(patches.movedim(1, -1)).movedim(-1, 1)


AnyEncoder = ControlEncoder | LatentControlEncoder
ENCODERS: dict[str, type[AnyEncoder]] = dict(zip(ENCODER_KINDS, (ControlEncoder, LatentControlEncoder), strict=True))
"""The kinds of encoders by the names that flags and files have for them."""


def kind_of(encoder: AnyEncoder) -> str:
    """The name of an encoder's kind."""
    return next(name for name, kind in ENCODERS.items() if type(encoder) is kind)


def read_encoder(folder: str | Path) -> AnyEncoder:
    """An encoder of either kind as its `save_pretrained` has written it.

    Raises:
        ValueError, OSError: something else, or nothing there.
    """
    name = ControlEncoder.load_config(folder).get("_class_name")
    for kind in ENCODERS.values():
        if kind.__name__ == name:
            return kind.from_pretrained(folder)
    names = " or a ".join(kind.__name__ for kind in ENCODERS.values())
    raise ValueError(f"{folder}: holds a {name}, needs a {names}")


def _check_reading(interpolation: str, value_range: Sequence[float] | None) -> None:
    """Raise `ValueError` for what does not say how control images are read."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r}: there are {', '.join(INTERPOLATIONS)}")
    if value_range is not None:
        rising(value_range)
