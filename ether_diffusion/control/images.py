"""Control images as an encoder takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.images import INTERPOLATIONS, ValueRange, to_rgb

ControlImage = Image.Image | np.ndarray | Tensor
Images = ControlImage | Sequence[ControlImage]


def control_tensor(
    images: Images,
    *,
    height: int,
    width: int,
    interpolation: str = "nearest",
    channels: int = 3,
    value_range: ValueRange | None = None,
) -> Tensor:
    """Control images as an encoder takes them: (b, channels, height, width), float32, in [0, 1].

    Args:
        images: PIL images of any mode; numpy arrays (h, w), (h, w, c) or (b, h, w, c), or tensors (c, h, w) or
            (b, c, h, w), with values in [0, 1]; or a list of such.
        height, width: in pixels.
        interpolation: what brings other sizes to this one.
        channels: of the encoder; PIL images have 3.
        value_range: of PIL images of more than 8 bits, as `images.to_rgb` takes it, which reads them for training,
            too.

    Raises:
        ValueError: another type or shape, values outside the range or not finite, or nothing at all.
    """
    each = list(images) if isinstance(images, list | tuple) else [images]
    if not each:
        raise ValueError("control_image is an empty list: one image, or one for each prompt, fits")
    arrays = [array for image in each for array in _arrays(image, channels, value_range)]
    sized = [
        np.stack([_resize(array[..., c], height, width, interpolation) for c in range(channels)]) for array in arrays
    ]
    return torch.from_numpy(np.stack(sized))  # (b, c, h, w)


def _arrays(image: ControlImage, channels: int, value_range: ValueRange | None) -> list[np.ndarray]:
    """The images in one entry, each (h, w, channels), float32.

    Raises:
        ValueError: see `control_tensor`.
    """
    if isinstance(image, Image.Image):
        try:
            values = np.asarray(to_rgb(image, value_range), dtype=np.float32) / 255
        except ValueError as error:
            raise ValueError(f"control_image {error}") from error
    elif isinstance(image, np.ndarray):
        values = image[..., None] if image.ndim == 2 else image
    elif isinstance(image, Tensor):
        values = image.detach().cpu().movedim(-3, -1) if image.ndim > 2 else image.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    else:
        raise ValueError(
            f"control_image is a {type(image).__name__}: a PIL image, a numpy array, a tensor, or a list of those fits"
        )
    given = f"control_image is a {type(image).__name__} of shape {tuple(np.shape(image))}"
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{given} and {values.dtype}: floating-point numbers from 0 to 1 fit (divide bytes by 255)")
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"{given}: arrays (h, w, c) or (b, h, w, c), and tensors (c, h, w) or (b, c, h, w), fit")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{given} with values from {values.min()} to {values.max()}: 0 to 1 fits")
    if channels == 3 and values.shape[-1] == 1:
        values = values.repeat(3, axis=-1)
    if channels == 3 and values.shape[-1] == 4:  # on white, as for images
        values = values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
    if values.shape[-1] != channels:
        raise ValueError(f"{given}: {channels} channels fit")
    values = values.astype(np.float32)
    return [values] if values.ndim == 3 else list(values)


def _resize(plane: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    if plane.shape == (height, width):
        return plane
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize((width, height), INTERPOLATIONS[interpolation])).clip(0, 1)  # lanczos overshoots
