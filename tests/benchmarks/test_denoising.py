"""The denoising loss on held-out images: the same for the same grid, however it is computed."""

import pytest
import torch
from denoising import denoising_loss
from helpers.flow_zoo import make
from helpers.zoo import sdxl
from PIL import Image

from ether_diffusion.images import to_pixels
from ether_diffusion.training.seeds import generator


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


@torch.no_grad()
def test_of_a_transformer_it_is_the_error_of_the_velocity(tmp_path):
    pipe = make("sd3", tmp_path)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    image = Image.effect_noise((side, side), 60).convert("RGB")
    config, errors = pipe.vae.config, []
    x = (pipe.vae.encode(to_pixels(image)[None]).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    states, _, pooled, _ = pipe.encode_prompt("a dog", None, None, do_classifier_free_guidance=False)
    for share in (0.25, 0.75):
        sigma = 3 * share / (1 + 2 * share)  # the scheduler's shift is 3
        for number in range(2):
            noise = torch.randn(x.shape[1:], generator=generator(0, "held-out noise", number))[None]
            noisy = (1 - sigma) * x + sigma * noise
            level = torch.tensor([1000 * sigma])
            velocity = pipe.transformer(noisy, states, pooled, level, return_dict=False)[0]
            errors.append((velocity - (noise - x)).square().mean())
    loss = denoising_loss(pipe, image, "a dog", timesteps=2, noises=2)
    assert loss == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert loss == pytest.approx(denoising_loss(pipe, image, "a dog", timesteps=2, noises=2, batch_size=1), rel=1e-5)
