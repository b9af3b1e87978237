"""What earlier releases wrote: a run goes on from their training checkpoints, and their adapter files load."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers.scripts import vectors
from PIL import Image

from ether_diffusion import EtherControlPipeline
from ether_diffusion.training import control, dreambooth

BEFORE = Path(__file__).parents[1] / "data" / "before"
"""Written by version 0.1.0 with the flags below and --max_train_steps 2 (`…-2`) or 4 (`…-4`)."""

COMMON = (
    "--pretrained_model_name_or_path base --num_validation_images 0 --train_batch_size 2 --seed 3 "
    "--adam_epsilon 1e-3 --checkpointing_steps 2 --learning_rate 0.01"
)
RUNS = {
    "dreambooth": (
        dreambooth.main,
        "--instance_data_dir photos --instance_prompt toy --train_text_encoder --use_ema --random_flip",
        StableDiffusionPipeline,
    ),
    "control": (control.main, "--train_data_dir maps", EtherControlPipeline),
}


@pytest.fixture
def before(tmp_path, monkeypatch) -> Path:
    """A copy of what was written, as the working directory: the options in a checkpoint hold relative paths."""
    monkeypatch.chdir(shutil.copytree(BEFORE, tmp_path / "before"))
    return tmp_path / "before"


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_release(before, run):
    main, flags, _ = RUNS[run]
    flags = f"{COMMON} {flags} --output_dir {run}-2 --max_train_steps 4 --resume_from_checkpoint checkpoint-2"
    result = main(flags.split())
    assert len(result.losses) == 4
    begun = vectors(BEFORE / f"{run}-2")
    resumed, wanted = vectors(before / f"{run}-2"), vectors(before / f"{run}-4")
    torch.testing.assert_close(resumed, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(resumed, begun, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_an_adapter_file_of_an_earlier_release_loads_and_generates(before, run):
    kind = RUNS[run][2]

    def generate(pipe: DiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        inputs = {"control_image": Image.open("maps/map0.png")} if run == "control" else {}
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
        return pipe("toy", generator=torch.Generator().manual_seed(0), **size, **inputs).images[0]

    images = []
    for steps in (2, 4):
        pipe = kind.from_pretrained("base")
        pipe.load_ether_weights(f"{run}-{steps}")
        images.append(generate(pipe))
    assert torch.isfinite(images[0]).all() and not torch.equal(*images)
