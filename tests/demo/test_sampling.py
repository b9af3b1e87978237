"""What the page must know of a base model to ask it for an image."""

import pytest
from helpers import flow_zoo

from ether_diffusion import miniature
from ether_diffusion.demo.sampling import guidance, sizes


@pytest.mark.parametrize(
    ("name", "own", "asked"),
    [
        ("flux", (256, 4), ("guidance_scale", 3.5)),
        ("sd3", (16, 4), ("guidance_scale", 7.0)),
        ("qwen", (512, 8), ("true_cfg_scale", 4.0)),
        ("z_image", (1024, 4), ("guidance_scale", 5.0)),
    ],
)
def test_transformers_have_the_sizes_and_the_guidance_of_their_pipelines(name, own, asked, tmp_path):
    pipe = flow_zoo.make(name, tmp_path)
    assert sizes(pipe) == own and guidance(pipe) == asked


def test_a_unet_has_its_own_size_and_the_usual_guidance():
    pipe = miniature.load_pipeline()
    assert sizes(pipe) == (64, 8) and guidance(pipe) == ("guidance_scale", 5.0)
