"""Control images as an encoder takes them."""

import numpy as np
import pytest
import torch
from helpers.control import IMAGE
from helpers.pipelines import generate
from PIL import Image

from ether_diffusion.control.images import control_tensor


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 65535], [65535, 0]], dtype=np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode != "L" else grey
    hint = control_tensor(image, height=2, width=2)
    assert hint.shape == (1, 3, 2, 2)
    assert torch.allclose(hint[0, :, 0], torch.tensor([0.0, 1.0]).expand(3, 2), atol=0.01)


def test_nearest_invents_no_class_and_lanczos_stays_in_range():
    labels = Image.fromarray(np.random.default_rng(0).choice([0, 100, 255], (5, 7)).astype(np.uint8))
    assert set(control_tensor(labels, height=16, width=12).mul(255).round().unique().tolist()) <= {0, 100, 255}
    smooth = control_tensor(labels, height=16, width=12, interpolation="lanczos")
    assert len(smooth.unique()) > 20 and smooth.min() >= 0 and smooth.max() <= 1


def test_one_image_is_the_same_as_pil_numpy_and_tensor():
    array = np.asarray(IMAGE, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = control_tensor(IMAGE, height=8, width=8, interpolation="lanczos")
    for picture in (array, array[None], tensor, tensor[None], [tensor]):
        assert torch.equal(control_tensor(picture, height=8, width=8, interpolation="lanczos"), wanted)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("map.png", "is a str: a PIL image"),
        ([], "empty list"),
        (np.zeros((4, 4, 3), dtype=np.uint8), r"\(4, 4, 3\) and uint8.*divide bytes by 255"),
        (torch.full((3, 4, 4), 1.5), "from 1.5 to 1.5: 0 to 1 fits"),
        (torch.full((3, 4, 4), torch.nan), "0 to 1 fits"),
        (torch.zeros(2, 4, 4), r"\(2, 4, 4\): 3 channels fit"),
        (np.zeros(4), r"\(4,\): arrays"),
    ],
)
def test_a_control_image_that_cannot_be_used_is_one_sentence(pipe, picture, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, control_image=picture)
