"""Control encoders in adapter files: what the document says of one, and the encoder that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from ether_diffusion.adapters.entries import Entry, validated
from ether_diffusion.control.encoder import ENCODERS, AnyEncoder, kind_of
from ether_diffusion.errors import EtherFileError
from ether_diffusion.images import rising

# Far above any real encoder.
MAX_CHANNELS = 1 << 14
MAX_LEVELS = 8
MAX_PATCH = 16  # latents of a side that a token is made of

Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]


class EncoderEntry(Entry):
    """The arguments of a `ControlEncoder`."""

    out_channels: Channels
    conditioning_channels: Channels
    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=MAX_LEVELS)]
    interpolation: Literal["nearest", "lanczos"]
    value_range: Annotated[list[float], AfterValidator(rising)] | None = None


class LatentEncoderEntry(Entry):
    """The arguments of a `LatentControlEncoder`."""

    out_channels: Channels
    in_channels: Channels
    patch_size: Annotated[int, Field(ge=1, le=MAX_PATCH)]
    channels_last: bool
    interpolation: Literal["nearest", "lanczos"]
    value_range: Annotated[list[float], AfterValidator(rising)] | None = None


class ControlEntry(Entry):
    """What the document says of a control encoder; without a kind, it is one of convolutions."""

    config: EncoderEntry
    kind: Literal["conv"] = "conv"


class LatentControlEntry(Entry):
    """What the document says of a control encoder of latents."""

    config: LatentEncoderEntry
    kind: Literal["latent"]


def about_encoder(encoder: AnyEncoder) -> dict[str, Any]:
    """What the document says of a control encoder."""
    kind = kind_of(encoder)
    return {"config": encoder.arguments, **({} if kind == "conv" else {"kind": kind})}


def empty_encoder(about: Mapping[str, Any]) -> AnyEncoder:
    """The control encoder that a checked entry describes, without weights; draws no random numbers."""
    with torch.device("meta"):
        return ENCODERS[about.get("kind", "conv")](**about["config"])


def check_encoder(where: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check the weights of a control encoder against what the document says of it.

    Raises:
        EtherFileError: an entry of another form, a name too many or too few, or another shape.
    """
    kind = about.get("kind", "conv")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise EtherFileError(f"{where}: weights: kind: got {kind!r:.80}, needs {' or '.join(ENCODERS)}")
    validated(LatentControlEntry if kind == "latent" else ControlEntry, f"{where}: weights", about)
    # Shapes alone: the sizes are the file's.
    needed = {name: tuple(p.shape) for name, p in empty_encoder(about).named_parameters()}
    if wrong := sorted(set(needed) ^ set(tensors)):
        raise EtherFileError(
            f"{where}: {wrong[0]} {'is missing' if wrong[0] in needed else 'is no weight of a control encoder'}"
        )
    for name, shape in needed.items():
        if tuple(tensors[name].shape) != shape:
            raise EtherFileError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, but the config needs {shape}"
            )
