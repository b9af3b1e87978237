"""Grids of images: every row under its title, as large as a person needs."""

import time

import numpy as np
from PIL import Image

from ether_diffusion.images import image_grid


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_are_not():
    small, large = Image.effect_noise((16, 16), 90).convert("RGB"), Image.new("RGB", (200, 200))
    grid = image_grid([("two", [small, small]), ("one", [small])])
    assert grid.size == (2 * (128 + 8) + 8, 2 * (128 + 40))
    assert np.array_equal(np.asarray(grid.crop((8, 32, 136, 160)))[::8, ::8], np.asarray(small))
    assert image_grid([("black", [large])]).size == (200 + 16, 200 + 40)


def test_a_title_that_is_too_long_is_cut_short_without_delay():
    started = time.perf_counter()
    grid = image_grid([("a word " * 20_000, [Image.new("RGB", (200, 200))])])
    assert grid.width == 200 + 16 and time.perf_counter() - started < 10
    title = np.asarray(grid.convert("L"))[:32]
    assert (title[:, 8:-8] < 255).any() and (title[:, -8:] == 255).all()
    fitting = image_grid([("short", [Image.new("RGB", (200, 200))])])
    assert not np.array_equal(np.asarray(fitting)[:32], title)
