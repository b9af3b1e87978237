"""Sample images of a run: what the grid shows, and when it is made."""

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion import EtherConfig
from ether_diffusion.training.families import family_of
from ether_diffusion.training.options import ValidationOptions
from ether_diffusion.training.preview import Preview, is_due


def test_the_grid_shows_the_model_before_and_after(tiny_pipeline):
    options = ValidationOptions(num_validation_images=2, num_inference_steps=2)
    preview = Preview(family_of(tiny_pipeline), ["a dog", "a cat"], options, 0)
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
