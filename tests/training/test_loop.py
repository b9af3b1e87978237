"""Options, objective, loop and images, in this process."""

import pytest
import torch
from accelerate import Accelerator
from helpers.scripts import reset_accelerate

from ether_diffusion import EtherConfig
from ether_diffusion.errors import InputError
from ether_diffusion.training.families import family_of
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.methods.injection import add_adapters, check_targets, trained_parameters
from ether_diffusion.training.objectives import sample_losses
from ether_diffusion.training.options import (
    OptimizationOptions,
)


def test_an_unknown_target_lists_the_names_there_are(tiny_pipeline):
    with pytest.raises(InputError, match="unet: no layer is called 'to_query'; layers to adapt are .*to_out.0, to_q"):
        check_targets("unet", tiny_pipeline.unet, ["to_q", "to_query"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_are_what_recovers_the_image(tiny_pipeline, prediction):
    tiny_pipeline.scheduler.register_to_config(prediction_type=prediction)
    family = family_of(tiny_pipeline)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    noisy, target = family.add_noise(latents, noise, timesteps), family.target(latents, noise, timesteps)
    alpha = family.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    if prediction == "epsilon":
        recovered = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    else:
        recovered = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
    torch.testing.assert_close(recovered, latents, rtol=1e-3, atol=1e-3)


def test_latents_are_scaled_draws_of_the_autoencoder(tiny_pipeline):
    family = family_of(tiny_pipeline)
    pixels = torch.rand(3, 16, 16) * 2 - 1
    moments = family.encode_pixels(pixels)
    mean = tiny_pipeline.vae.encode(pixels[None]).latent_dist.mode()[0] * tiny_pipeline.vae.config.scaling_factor
    torch.testing.assert_close(family.make_latents(moments, None), mean)
    draws = [family.make_latents(moments, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_losses_of_different_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="prediction has shape"):
        sample_losses(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))


class Quadratic(torch.nn.Module):
    """Sample s pulls the weight towards s mod 2; remembers which samples it saw."""

    def __init__(self, broken_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.broken_at = broken_at

    def forward(self, samples):
        self.seen.append(list(samples))
        goals = torch.tensor([float(s % 2) for s in samples])
        loss = (self.weight - goals).square()
        return loss * float("nan") if self.broken_at in samples else loss


def run(objective, **options):
    options = OptimizationOptions(learning_rate=0.1, **options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.gradient_accumulation_steps)
    return Trainer(accelerator, objective, [{"params": [objective.weight], "lr": 0.1}], options).train()


def test_the_loop_visits_every_sample_once_and_converges():
    objective = Quadratic()
    result = run(objective, max_train_steps=60, train_batch_size=4)
    assert objective.seen == [list(range(4 * k, 4 * k + 4)) for k in range(60)]
    assert len(result.losses) == 60 and objective.weight.item() == pytest.approx(0.5, abs=0.05)


def test_accumulation_is_a_larger_batch():
    whole, parts = Quadratic(), Quadratic()
    first = run(whole, max_train_steps=5, train_batch_size=6)
    reset_accelerate()
    second = run(parts, max_train_steps=5, train_batch_size=2, gradient_accumulation_steps=3)
    assert sum(parts.seen, []) == sum(whole.seen, [])
    assert second.losses == pytest.approx(first.losses) and parts.weight.item() == pytest.approx(whole.weight.item())


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step():
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3 of 9"):
        run(Quadratic(broken_at=5), max_train_steps=9, train_batch_size=2)


def test_warm_up_lets_the_learning_rate_rise():
    slow, fast = Quadratic(), Quadratic()
    run(slow, max_train_steps=4, lr_scheduler="constant_with_warmup", lr_warmup_steps=100)
    reset_accelerate()
    run(fast, max_train_steps=4)
    assert slow.weight.item() < 0.1 * fast.weight.item()


def test_the_starts_follow_from_the_seed_and_leave_the_global_state(tiny_pipeline_folder):
    from diffusers import UNet2DConditionModel

    starts = []
    for seed in (0, 0, 1):
        model = UNet2DConditionModel.from_pretrained(tiny_pipeline_folder, subfolder="unet")
        config = {"unet": EtherConfig()}
        state = torch.get_rng_state()
        add_adapters({"unet": model}, config, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(torch.cat([p.flatten() for p in trained_parameters({"unet": model}, config)]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
