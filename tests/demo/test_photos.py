"""Photographs that users send."""

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.demo.photos import cut_square, read_photo
from ether_diffusion.errors import InputError


def test_a_photo_with_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png: has 60,000,000 pixels; 50,000,000 at most fit"):
        read_photo(tmp_path / "large.png", 256)
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no.png: is not an image that can be read"):
        read_photo(tmp_path / "no.png", 256)


def test_a_cut_is_the_square_that_was_asked_for():
    image = Image.fromarray(np.arange(60 * 100, dtype=np.int32).reshape(60, 100))
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(cut_square(image)), pixels[:, 20:80])
    assert np.array_equal(np.asarray(cut_square(image, 50, 0, 100)), pixels[30:, :30])
    assert np.array_equal(np.asarray(cut_square(image, 50, 250, -3)), pixels[:30, 70:])
    assert cut_square(image, 0).size == (1, 1)
