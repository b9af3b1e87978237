"""Images that tests draw."""

import numpy as np
from PIL import Image


def gradient(width=40, height=30) -> Image.Image:
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
