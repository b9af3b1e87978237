"""Images of the miniature's world."""

import numpy as np
from PIL import Image

from ether_diffusion.miniature.world import draw_scene


def images(count: int, noise: float = 0.0, seed: str = "fid") -> list[Image.Image]:
    random, found = np.random.default_rng(0), []
    for k in range(count):
        pixels = np.asarray(draw_scene(seed, k).render().image) + noise * random.standard_normal((64, 64, 3))
        found.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return found
