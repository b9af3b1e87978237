"""The second miniature: a Stable Diffusion 3 in small, which loads by stock calls and generates."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from helpers.scripts import ROOT
from safetensors import safe_open

from ether_diffusion import miniature
from ether_diffusion.files import checksum

FOLDER = miniature.FOLDERS["miniature-dit"]
REPORT = ROOT / "benchmarks" / "results" / "miniature_dit.json"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = miniature.load_pipeline("dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def report() -> dict:
    """What was measured of the shipped weights. Without it they may be any, such as those before the training."""
    if not REPORT.exists():
        pytest.skip("the weights have not been measured: tools/evaluate_miniature.py --model_dir miniature-dit")
    return json.loads(REPORT.read_text())


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


def test_another_prompt_gives_another_image(pipe):
    red, blue = (generate(pipe, f"a white star on a {colour} background") for colour in ("red", "blue"))
    assert np.abs(red - blue).mean() > 1 / 255


def test_prompts_decide_the_background(pipe, report):
    image = generate(pipe, "a red circle on a blue background")
    corner = image[:8, :8].mean((0, 1))
    assert corner[2] > 0.55 and corner[2] > corner[0] + 0.3 and corner[2] > corner[1] + 0.3


def test_the_same_seed_generates_the_same_image(pipe):
    assert np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy"))
    assert not np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy", seed=1))


def test_the_recorded_quality_is_that_of_the_shipped_weights(report):
    assert report["weights_sha256"] == checksum(FOLDER)
    found = report["painted_for_unseen_combinations"]
    assert found["shape"] >= 0.9 and found["colours"] >= 0.95


@pytest.mark.slow
def test_the_measuring_tool_takes_it_by_its_name(tmp_path):
    before = REPORT.read_bytes() if REPORT.exists() else None
    command = [sys.executable, ROOT / "tools" / "evaluate_miniature.py", "--output_dir", tmp_path / "out"]
    command += ["--model_dir", "miniature-dit", "--images", "2", "--judge_steps", "2", "--num_inference_steps", "2"]
    command += ["--results_file", tmp_path / "results" / "dit.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results" / "dit.json").read_text())
    assert written == json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["weights_sha256"] == checksum(FOLDER) and written["pictures"] == 2
    assert (REPORT.read_bytes() if REPORT.exists() else None) == before
