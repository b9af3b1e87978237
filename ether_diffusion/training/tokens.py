"""Latents as the tokens of a transformer, and where each token lies. Latents (b, c, h, w), tokens (b, n, d)."""

from collections.abc import Sequence

import torch
from torch import Tensor

PATCH = 2


def split_patches(latents: Tensor) -> Tensor:
    """2×2 pixels as channels: (b, c, 2h, 2w) to (b, 4c, h, w), channels in the order (c, row, column)."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH)


def join_patches(latents: Tensor) -> Tensor:
    """The inverse of `split_patches`."""
    return torch.nn.functional.pixel_shuffle(latents, PATCH)


def to_tokens(latents: Tensor) -> Tensor:
    """Every position as a token, row by row: (b, c, h, w) to (b, h·w, c)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """The first tokens as latents of the shape of others: (b, n, c), n ≥ h·w, to (b, c, h, w)."""
    height, width = like.shape[-2:]
    return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def grid_ids(height: int, width: int, *, axes: int, first: int = 0) -> Tensor:
    """Coordinates (first, row, column, 0, …) of the tokens of an image, row by row: (height·width, axes), float32."""
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = first
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows (length, d) of several lengths as one tensor (b, longest, d), and which tokens are none of the padding.

    The mask (b, longest) is None where all lengths are equal.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) == 1:
        return torch.stack(list(rows)), None
    mask = torch.zeros(len(rows), max(lengths), dtype=torch.bool, device=rows[0].device)
    for k, row in enumerate(rows):
        mask[k, : len(row)] = True
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask
