"""Light control: an image (a label map, edges, a pose) steers the UNet through one small encoder.

The encoder's features are added once, right after the UNet's first convolution. The UNet itself is frozen; what it
does with them, reflections learn. Source: ETHER, arXiv:2405.20271, after OFT, arXiv:2306.07280.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusers import (
    ConfigMixin,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from ether_diffusion.images import INTERPOLATIONS, rising

CONTROL = "control_encoder"
"""What files and `set_adapters` call the encoder, as they call a UNet "unet"."""
WIDTHS = (16, 32, 96, 256)


class ControlEncoder(ModelMixin, ConfigMixin):
    """From a control image to what is added after a UNet's first convolution.

    (b, 3, h, w) in [0, 1] -> (b, out_channels, h / f, w / f), f = 2 to the power of len(block_out_channels) − 1.
    The last convolution starts at zero: an encoder that nothing was taught changes no image.

    Args:
        out_channels: of the UNet's first convolution.
        conditioning_channels: of the control image.
        block_out_channels: widths on the way down; between two of them the size halves.
        interpolation: how a control image is brought to the size of the image. "nearest" keeps label maps free of
            classes that are not there, "lanczos" keeps photographs and soft edges smooth.
        value_range: (black, white) in control images of more than 8 bits, as it was stated in training; None goes by
            the mode of the image.

    Raises:
        ValueError: a width below 1, no widths, an unknown interpolation, or a range that does not rise.
    """

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
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={interpolation!r}: there are {', '.join(INTERPOLATIONS)}")
        if value_range is not None:
            rising(value_range)
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
        unet: nn.Module,
        factor: int = 8,
        interpolation: str = "nearest",
        value_range: Sequence[float] | None = None,
    ) -> ControlEncoder:
        """A new encoder that fits a UNet.

        Args:
            unet: its first convolution gives the number of channels.
            factor: by how much the autoencoder reduces a side (a pipeline's `vae_scale_factor`).
            interpolation, value_range: as for the class.

        Raises:
            ValueError: a factor that is no power of two, or a model without `conv_in`.
        """
        if factor < 1 or factor & (factor - 1):
            raise ValueError(f"factor={factor}: 1, 2, 4, 8, 16 … fit")
        steps = factor.bit_length() - 1
        widths = (*WIDTHS, *(WIDTHS[-1],) * steps)[: steps + 1]
        return cls(
            first_convolution(unet).out_channels,
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


def first_convolution(unet: nn.Module) -> nn.Module:
    """A UNet's first convolution, without what adapters wrap around it.

    Raises:
        ValueError: the model has none of that name.
    """
    if not isinstance(module := getattr(unet, "conv_in", None), nn.Module):
        raise ValueError(f"{type(unet).__name__} has no conv_in, after which control features are added")
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@contextlib.contextmanager
def inject(unet: nn.Module, features: Tensor | Callable[[], Tensor | None] | None) -> Iterator[None]:
    """Within the context, add features to what the UNet's first convolution makes, in every call.

    Args:
        unet: adapted or not, whole or compiled region by region.
        features: (f, c, h, w), in the order of the latents, or a function that is asked for them once in every call.
            A batch that is a multiple of f, e.g. that of classifier-free guidance, gets them repeated. None adds
            nothing.

    Raises:
        ValueError: a UNet without `conv_in`, or one compiled as a whole; and, within, features of another shape.
    """
    first_convolution(unet)
    if hasattr(unet, "_orig_mod") or getattr(unet, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the UNet is compiled as a whole, which would leave the control features out: compile it region by region "
            "(unet.compile_repeated_blocks)"
        )

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        now = features() if callable(features) else features
        if now is None:
            return None  # the output itself, bit for bit
        if now.ndim != 4 or now.shape[1:] != output.shape[1:]:
            raise ValueError(
                f"control features of shape {tuple(now.shape)} do not fit the UNet's first convolution, which makes "
                f"{tuple(output.shape)}"
            )
        repeats, rest = divmod(len(output), len(now)) if len(now) else (0, 1)
        if rest:
            raise ValueError(
                f"the UNet is called with a batch of {len(output)}, which is no multiple of the {len(now)} control "
                f"features: {tuple(now.shape)} for {tuple(output.shape)}"
            )
        return output + now.to(output).repeat(repeats, 1, 1, 1)

    handle = unet.conv_in.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
