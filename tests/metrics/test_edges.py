"""Edges of images against their edge maps."""

import numpy as np
import pytest
from helpers.scenes import images
from PIL import Image

from ether_diffusion.metrics import edge_consistency, sobel_edges


def test_edges_of_an_image_are_consistent_with_themselves():
    image = images(1)[0]
    own = Image.fromarray(sobel_edges(image).numpy())
    assert edge_consistency(image, own) == 1
    assert edge_consistency(image, Image.new("L", image.size)) == 0
    assert edge_consistency(Image.new("RGB", image.size), Image.new("L", image.size)) == 1


def test_edges_may_be_off_by_the_tolerance_and_no_further():
    def line(x: int) -> tuple[Image.Image, Image.Image]:
        pixels = np.zeros((32, 32), np.uint8)
        pixels[:, x:] = 255
        edges = np.zeros((32, 32), np.uint8)
        edges[:, x - 1 : x + 1] = 255
        return Image.fromarray(pixels), Image.fromarray(edges)

    image, own = line(16)
    assert np.array_equal(sobel_edges(image).numpy() * 255, np.asarray(own))
    assert edge_consistency(image, own, tolerance=0) == 1
    assert edge_consistency(image, line(17)[1]) == 1
    assert edge_consistency(image, line(18)[1]) == pytest.approx(0.5)
    assert edge_consistency(image, line(20)[1]) == 0
    with pytest.raises(ValueError, match=r"\(32, 32\), its edge map \(8, 8\)"):
        edge_consistency(image, own.resize((8, 8)))


def test_edges_between_colours_of_one_brightness_are_seen():
    red, green = np.array([150, 0, 0]), np.array([0, 76, 0])
    pixels = np.where(np.arange(16)[None, :, None] < 8, red, green).repeat(16, 0).astype(np.uint8)
    assert sobel_edges(Image.fromarray(pixels)).sum() == 32
