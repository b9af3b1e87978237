"""Options, objective, loop and images, in this process."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.scripts import reset_accelerate
from PIL import Image

from ether_diffusion import EtherConfig
from ether_diffusion.errors import InputError
from ether_diffusion.training.families import family_of
from ether_diffusion.training.loop import train
from ether_diffusion.training.methods.injection import add_adapters, check_targets, trained_parameters
from ether_diffusion.training.objectives import denoising_loss, sample_losses
from ether_diffusion.training.options.command_line import build_parser, flatten, parse_options
from ether_diffusion.training.options.groups import (
    AdapterOptions,
    InstanceDataOptions,
    OptimizationOptions,
    ValidationOptions,
    ViewOptions,
)
from ether_diffusion.training.preview import Preview, is_due


@dataclass(frozen=True, kw_only=True)
class Options:
    data: InstanceDataOptions
    views: ViewOptions
    adapter: AdapterOptions
    optimization: OptimizationOptions
    validation: ValidationOptions


NEEDED = ["--instance_data_dir", "photos", "--instance_prompt", "a dog"]


def test_flags_become_options_and_defaults_stay():
    options = parse_options(
        Options, [*NEEDED, "--method", "ether", "--target_modules", "to_q", "to_v", "--random_flip"]
    )
    assert options.adapter.method == "ether" and options.adapter.target_modules == ("to_q", "to_v")
    assert options.views.random_flip and not options.views.center_crop
    assert options.optimization == OptimizationOptions()
    flat = flatten(options)
    assert flat["target_modules"] == "to_q, to_v" and flat["resolution"] == "default"
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_blocks", "0"], "--num_blocks: got 0, needs a whole number from 1"),
        (["--learning_rate", "-1"], "--learning_rate: got -1.0, needs a finite number above 0"),
        (["--learning_rate", "nan"], "needs a finite number above 0"),
        (["--adam_beta1", "1"], "below 1"),
        (["--instance_prompt", " "], "--instance_prompt: got ' ', needs a text"),
        (["--text_encoder_target_modules", "q_proj"], "has no effect without --train_text_encoder"),
        (["--lr_warmup_steps", "5"], "use constant_with_warmup"),
    ],
)
def test_a_value_that_does_not_fit_is_explained(flags, message):
    with pytest.raises(InputError, match=message):
        parse_options(Options, [*NEEDED, *flags])


@pytest.mark.parametrize(
    "flags", [["--no_such_flag"], ["--method", "dora"], ["--max_train_steps", "many"], ["--meth", "ether"]]
)
def test_unknown_flags_and_choices_end_the_program(flags, capsys):
    with pytest.raises(SystemExit):
        parse_options(Options, [*NEEDED, *flags])
    assert flags[0] in capsys.readouterr().err


def test_help_names_every_flag():
    text = build_parser(Options).format_help()
    for group in Options.__dataclass_fields__.values():
        assert all(f"--{name}" in text for name in group.type.__dataclass_fields__)


def test_steps_and_learning_rates_become_definite():
    fixed = {"default_learning_rate": 0.25, "epoch_samples": 10, "processes": 2}
    usual = OptimizationOptions().resolve(**fixed)
    assert (usual.steps, usual.learning_rate, usual.text_encoder_lr) == (200, 0.25, None)
    epochs = OptimizationOptions(num_train_epochs=3, train_batch_size=4, gradient_accumulation_steps=2).resolve(
        **fixed
    )
    assert epochs.steps == 2  # 30 images, 16 a step
    scaled = OptimizationOptions(learning_rate=0.5, text_encoder_lr=0.125, train_batch_size=4, scale_lr=True)
    scaled = scaled.resolve(**fixed)
    assert (scaled.learning_rate, scaled.text_encoder_lr) == (4.0, 1.0)
    assert scaled.resolve(**fixed) == scaled
    assert OptimizationOptions(optimizer="prodigy").resolve(**fixed).learning_rate == 1.0
    with pytest.raises(ValueError, match="not resolved"):
        _ = OptimizationOptions(num_train_epochs=3).steps


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


def test_the_held_out_loss_is_repeatable_and_the_same_for_any_batch(tiny_pipeline):
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    grid = {"timesteps": 3, "noises": 2}
    loss = denoising_loss(tiny_pipeline, image, "a dog", **grid)
    assert loss == denoising_loss(tiny_pipeline, image, "a dog", **grid)
    assert loss == pytest.approx(denoising_loss(tiny_pipeline, image, "a dog", batch_size=1, **grid), rel=1e-5)
    assert loss != denoising_loss(tiny_pipeline, image, "a dog", seed=1, **grid)
    with pytest.raises(ValueError, match="at least 1"):
        denoising_loss(tiny_pipeline, image, "a dog", timesteps=0)


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


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def run(objective, **options):
    options = OptimizationOptions(learning_rate=0.1, **options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.gradient_accumulation_steps)
    return train(accelerator, objective, [{"params": [objective.weight], "lr": 0.1}], options)


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


def test_the_grid_shows_the_model_before_and_after(tiny_pipeline):
    options = ValidationOptions(num_validation_images=2, num_inference_steps=2)
    preview = Preview(family_of(tiny_pipeline), ["a dog", "a cat"], options, 0)
    unchanged = preview.compare()
    torch.manual_seed(0)
    tiny_pipeline.unet.add_adapter(EtherConfig(init_weights=False))
    grid = preview.compare()
    assert grid.width > 2 * 128 and grid.height > 4 * 128
    row = grid.height // 4

    def rows(picture: Image.Image) -> list[np.ndarray]:
        return [np.asarray(picture)[k * row + 40 : (k + 1) * row] for k in range(4)]  # without the titles

    assert all(np.array_equal(rows(unchanged)[k], rows(unchanged)[k + 1]) for k in (0, 2))
    assert all(np.array_equal(rows(unchanged)[k], rows(grid)[k]) for k in (0, 2))
    assert not any(np.array_equal(rows(grid)[k], rows(grid)[k + 1]) for k in (0, 2))


@pytest.mark.parametrize(
    ("given", "generated"),
    [
        ({}, []),
        ({"validation_steps": 3}, [3, 6, 9]),
        ({"validation_epochs": 1}, [3, 5, 8]),
        ({"validation_epochs": 2}, [5]),
    ],
)
def test_images_are_due_after_steps_or_epochs_and_not_at_the_end(given, generated):
    due = is_due(ValidationOptions(**given), epoch_samples=5, step_samples=2, steps=10)
    assert [step for step in range(1, 11) if due(step)] == generated
