"""Where control enters a denoiser: right after the first projection of its latents.

Adding E·z to what the projection W makes of latents x is the same as one projection [W | E] of both side by side, so
the denoiser itself stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

# Axes: f features, b samples of a call, c channels (the width between blocks), h and w tokens of a side, n = h·w.


@dataclass(frozen=True)
class Layout:
    """How a kind of denoiser projects latents.

    path: of the first projection.
    patch: latents of a side that become one token.
    channels_last: whether the columns of a token are in the order (row, column, channel), not (channel, row, column).
    """

    path: str
    patch: int
    channels_last: bool = False


LAYOUTS: dict[type[nn.Module], Layout] = {
    FluxTransformer2DModel: Layout("x_embedder", 2),
    ChromaTransformer2DModel: Layout("x_embedder", 2),
    Flux2Transformer2DModel: Layout("x_embedder", 1),  # its latents are patches already
    SD3Transformer2DModel: Layout("pos_embed.proj", 2),
    SanaTransformer2DModel: Layout("patch_embed.proj", 1),
    QwenImageTransformer2DModel: Layout("img_in", 2),
    Krea2Transformer2DModel: Layout("img_in", 2),
    Lumina2Transformer2DModel: Layout("x_embedder", 2, channels_last=True),
    ZImageTransformer2DModel: Layout("all_x_embedder.2-1", 2, channels_last=True),
}
UNET = Layout("conv_in", 1)
PADDED_TO = 32
"""Z-Image pads the tokens of every image to a multiple of this, and lays all images of a batch end to end.

The padding becomes a token of its own after the projection, so it makes no difference what is added there.
"""


@dataclass(frozen=True)
class FirstProjection:
    """The first projection of a denoiser.

    hooked: the module as it stands in the denoiser, with the adapters around it. layer: without them.
    """

    hooked: nn.Module
    layer: nn.Module
    layout: Layout
    is_unet: bool

    @property
    def is_spatial(self) -> bool:
        """Whether it is a convolution of latents (b, c, h, w), not a linear map of tokens (b, n, c)."""
        return getattr(self.layer, "out_channels", None) is not None

    @property
    def width(self) -> int:
        """Channels that it makes."""
        return self.layer.out_channels if self.is_spatial else self.layer.out_features

    @property
    def channels(self) -> int:
        """Channels of the latents that it takes."""
        return self.layer.in_channels if self.is_spatial else self.layer.in_features // self.layout.patch**2


def first_projection(denoiser: nn.Module) -> FirstProjection:
    """The first projection of a UNet or of a transformer that is known here; adapters around it are seen through.

    Raises:
        ValueError: another model, or one whose projection does not lie where it does in all models of its kind.
    """
    model = denoiser
    while (inner := getattr(model, "_orig_mod", None)) is not None or hasattr(model, "get_base_model"):
        model = inner if inner is not None else model.get_base_model()
    layout = next((layout for kind, layout in LAYOUTS.items() if isinstance(model, kind)), UNET)
    try:
        hooked = model.get_submodule(layout.path)
    except AttributeError:
        hooked = None
    patch = _patch_of(model, layout)
    if not isinstance(hooked, nn.Module) or patch != layout.patch:
        known = ", ".join(["UNets (conv_in)", *(kind.__name__ for kind in LAYOUTS)])
        what = f"patches of {patch}, not {layout.patch}" if patch != layout.patch else f"no {layout.path}"
        raise ValueError(
            f"{type(model).__name__} has {what}, after which control features are added; they are for {known}"
        )
    layer = hooked.get_base_layer() if hasattr(hooked, "get_base_layer") else hooked
    return FirstProjection(hooked, layer, layout, layout is UNET)


def _patch_of(model: nn.Module, layout: Layout) -> int:
    """Latents of a side that the model itself makes one token of; where the pipeline does it, those of the layout."""
    if isinstance(model, (SD3Transformer2DModel, SanaTransformer2DModel, Lumina2Transformer2DModel)):
        return model.config.patch_size
    return layout.patch


Features = Tensor | Callable[[], Tensor | None] | None


@contextlib.contextmanager
def inject(denoiser: nn.Module, features: Features, *, references: bool = False) -> Iterator[None]:
    """Within the context, add features to what the denoiser's first projection makes, in every call.

    Args:
        denoiser: adapted or not, whole or compiled region by region.
        features: (f, c, h, w), in the order of the latents, or a function that is asked for them once in every call.
            A batch that is a multiple of f, e.g. that of classifier-free guidance, gets them repeated. None adds
            nothing.
        references: whether the tokens of reference images follow those of the image; nothing is added to them.

    Raises:
        ValueError: a denoiser that is not known, or one compiled as a whole; and, within, features of another shape.
    """
    projection = first_projection(denoiser)
    if hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None:
        name = "UNet" if projection.is_unet else "transformer"
        raise ValueError(
            f"the {name} is compiled as a whole, which would leave the control features out: compile it region by "
            f"region ({name.lower()}.compile_repeated_blocks)"
        )

    def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        now = features() if callable(features) else features
        if now is None:
            return None  # the output itself, bit for bit
        if now.ndim == 4 and not projection.is_spatial:
            return _add_to_tokens(output, now, references)
        if now.ndim != 4 or now.shape[1:] != output.shape[1:]:
            raise _unfit(now, output)
        return output + now.to(output).repeat(_repeats(len(output), now, output), 1, 1, 1)

    handle = projection.hooked.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _add_to_tokens(output: Tensor, features: Tensor, references: bool) -> Tensor:
    """Add (f, c, h, w) to the first n of the tokens (b, n or more, c) of each sample; of Z-Image, (b·padded n, c)."""
    added = features.to(output).flatten(2).transpose(1, 2)  # (f, n, c)
    count, tokens = added.shape[1], output
    if output.ndim == 2:
        padded = -(-count // PADDED_TO) * PADDED_TO
        if len(output) % padded:
            raise _unfit(features, output)
        tokens = output.unflatten(0, (-1, padded))
    has_more = tokens.shape[1] > count
    if tokens.ndim != 3 or tokens.shape[2] != added.shape[2] or tokens.shape[1] < count:
        raise _unfit(features, output)
    if has_more and output.ndim == 3 and not references:
        raise _unfit(features, output)
    added = added.repeat(_repeats(len(tokens), features, output), 1, 1)
    changed = tokens[:, :count] + added
    if has_more:
        changed = torch.cat([changed, tokens[:, count:]], dim=1)
    return changed.reshape(output.shape)


def _repeats(samples: int, features: Tensor, output: Tensor) -> int:
    """How often f features come in a batch of so many samples."""
    repeats, rest = divmod(samples, len(features)) if len(features) else (0, 1)
    if rest:
        raise ValueError(
            f"the denoiser is called with a batch of {samples}, which is no multiple of the {len(features)} control "
            f"features: {tuple(features.shape)} for {tuple(output.shape)}"
        )
    return repeats


def _unfit(features: Tensor, output: Tensor) -> ValueError:
    return ValueError(
        f"control features of shape {tuple(features.shape)} do not fit the denoiser's first projection, which makes "
        f"{tuple(output.shape)}"
    )
