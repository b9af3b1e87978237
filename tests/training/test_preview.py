"""Sample images of a run: what the grid shows, and when it is made."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from helpers.scripts import refusal, same
from PIL import Image

from ether_diffusion import EtherConfig
from ether_diffusion.training.families import family_of
from ether_diffusion.training.options import ValidationOptions
from ether_diffusion.training.options.run import SCHEDULERS
from ether_diffusion.training.preview import Preview, is_due


def test_the_grid_shows_the_model_before_and_after(tiny_pipeline):
    options = ValidationOptions(num_validation_images=2, num_inference_steps=2)
    preview = Preview(family_of(tiny_pipeline), ["a dog", "a cat"], options, 0, target=(16, 16))
    unchanged = preview.compare()
    torch.manual_seed(0)
    tiny_pipeline.unet.add_adapter(EtherConfig(init_weights=False))
    grid = preview.compare()
    assert grid.width > 2 * 128 and grid.height > 4 * 128
    row = grid.height // 4

    def rows(image: Image.Image) -> list[np.ndarray]:
        return [np.asarray(image)[k * row + 40 : (k + 1) * row] for k in range(4)]  # without the titles

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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_generated_with_the_scheduler_asked_for_and_the_pipeline_keeps_its_own(tiny_pipeline, name):
    found = tiny_pipeline.scheduler
    options = ValidationOptions(num_validation_images=1, num_inference_steps=4, validation_scheduler=name)
    made = Preview(family_of(tiny_pipeline), ["a dog"], options, 0, target=(16, 16)).base[0][0]
    assert tiny_pipeline.scheduler is found
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(found.config)
    draw = torch.Generator().manual_seed(0)
    wanted = tiny_pipeline("a dog", num_inference_steps=4, guidance_scale=7.5, generator=draw).images[0]
    assert np.array_equal(np.asarray(made), np.asarray(wanted))


def test_a_run_samples_with_another_scheduler_and_trains_the_same(train):
    flags = ["--num_validation_images", 1, "--num_inference_steps", 3, "--validation_steps", 1]
    plain = train(*flags, output="plain")[1]
    other = train(*flags, "--validation_scheduler", "EulerAncestralDiscreteScheduler", output="other")[1]
    assert same(plain, other) and (plain / "grid.png").read_bytes() != (other / "grid.png").read_bytes()


@pytest.mark.parametrize(("name", "steps"), [("PNDMScheduler", 3), ("DDIMScheduler", 1001), ("DDPMScheduler", 2000)])
@pytest.mark.parametrize("own", [True, False])
def test_steps_that_a_scheduler_does_not_take_are_one_sentence(train, bases, tmp_path, capsys, name, steps, own):
    flags = ["--num_validation_images", 1, "--num_inference_steps", steps]
    if own:
        base = Path(shutil.copytree(bases["sd"], tmp_path / "base"))
        index = (base / "model_index.json").read_text()
        (base / "model_index.json").write_text(index.replace("DDIMScheduler", name))
        flags += ["--pretrained_model_name_or_path", base]
    else:
        flags += ["--validation_scheduler", name]
    error = refusal(capsys, train, *flags)
    assert f"--num_inference_steps {steps}: the {name} does not take so many" in error
    assert not (tmp_path / "out").exists()
