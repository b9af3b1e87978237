"""The second miniature: a Stable Diffusion 3 in small, which loads by stock calls and generates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import safe_open

from ether_diffusion import miniature
from ether_diffusion.files import checksum

FOLDER = miniature.FOLDERS["miniature-dit"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = miniature.load_pipeline("dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt: str, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=10, guidance_scale=4.0, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_a_stock_call_loads_every_part_in_one_dtype(options):
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None, **options)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {options.get("dtype", torch.float32)}


@pytest.mark.parametrize("name", ["dit", "miniature-dit"])
def test_both_its_names_open_it(name):
    assert type(miniature.load_pipeline(name, dtype=torch.bfloat16)) is StableDiffusion3Pipeline


def test_the_first_one_has_names_too():
    kinds = {type(miniature.load_pipeline(*name)) for name in ((), ("unet",), ("miniature",))}
    assert kinds == {StableDiffusionPipeline}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="there is no miniature 'flux'; there are unet, dit"):
        miniature.load_pipeline("flux")


def test_the_folder_is_small_and_in_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert not any(str(FOLDER.parents[2]) in path.read_text() for path in files if path.suffix == ".json")
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}


def test_its_latents_are_those_of_the_first_one():
    vae, first = (folder / "vae/diffusion_pytorch_model.safetensors" for folder in (FOLDER, miniature.FOLDER))
    assert vae.read_bytes() == first.read_bytes()


def test_prompts_decide_the_background(pipe):
    image = generate(pipe, "a red circle on a blue background")
    corner = image[:8, :8].mean((0, 1))
    assert corner[2] > 0.55 and corner[2] > corner[0] + 0.3 and corner[2] > corner[1] + 0.3


def test_the_same_seed_generates_the_same_image(pipe):
    assert np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy"))
    assert not np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy", seed=1))


def test_the_recorded_quality_is_that_of_the_shipped_weights():
    report = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "miniature_dit.json").read_text())
    assert report["weights_sha256"] == checksum(FOLDER)
    found = report["painted_for_unseen_combinations"]
    assert found["shape"] >= 0.9 and found["colours"] >= 0.95
