"""The denoising loss on held-out images: the same for the same grid, however it is computed."""

import pytest
from denoising import denoising_loss
from helpers.zoo import sdxl
from PIL import Image


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_held_out_loss_is_repeatable_and_the_same_for_any_batch(tiny_pipeline, family):
    pipe = sdxl(tiny_pipeline) if family == "sdxl" else tiny_pipeline
    square = Image.effect_noise((16, 16), 60).convert("RGB")
    wide = Image.new("RGB", (40, 16))
    wide.paste(square, (12, 0))  # the same pixels in the central square of a longer image
    grid = {"timesteps": 3, "noises": 2}
    loss = denoising_loss(pipe, square, "a dog", **grid)
    assert loss == denoising_loss(pipe, square, "a dog", **grid)
    assert loss == pytest.approx(denoising_loss(pipe, square, "a dog", batch_size=1, **grid), rel=1e-5)
    assert loss != denoising_loss(pipe, square, "a dog", seed=1, **grid)
    # SDXL is told the size of the image.
    assert (loss == denoising_loss(pipe, wide, "a dog", **grid)) == (family == "sd")
    with pytest.raises(ValueError, match="at least 1"):
        denoising_loss(pipe, square, "a dog", timesteps=0)
