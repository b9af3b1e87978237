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


def pad_rows(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows (length, …) of several lengths as one tensor (b, longest, …), and which tokens are none of the padding.

    The mask (b, longest) is None where all lengths are equal. With a length, all rows are padded to it, and there is
    always a mask.
    """
    longest = max(len(row) for row in rows) if length is None else length
    if length is None and all(len(row) == longest for row in rows):
        return torch.stack(list(rows)), None
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=rows[0].device)
    padded = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    for k, row in enumerate(rows):
        mask[k, : len(row)] = True
        padded[k, : len(row)] = row
    return padded, mask
