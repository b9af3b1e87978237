"""Small real pipelines, made once per session and saved to disk as `save_pretrained` saves them."""

# ruff: noqa: E402
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.lora import ATTENTION, CLIP, save_adapter
from helpers.pipelines import adapt
from helpers.scripts import in_process, reset_accelerate
from helpers.tiny import make_pipeline, make_tokenizer
from transformers import CLIPTokenizer

from ether_diffusion.miniature.world import subjects
from ether_diffusion.training import dreambooth

for name in ("NO_PROXY", "no_proxy"):  # servers of the tests' own
    os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1", "localhost"])
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> CLIPTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    make_pipeline(tiny_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wider_pipeline_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """The same architecture at another width: adapters of the tiny pipeline do not fit it."""
    folder = tmp_path_factory.mktemp("pipelines") / "wider"
    make_pipeline(tiny_tokenizer, width=24).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_pipeline(tiny_pipeline_folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["ether", "ether_plus"])
def trained(request, tiny_pipeline) -> StableDiffusionPipeline:
    """The tiny pipeline with an adapter of each method, called "default", on its denoiser and its text encoder."""
    return adapt(tiny_pipeline, request.param, num_blocks=2)


@pytest.fixture(scope="session")
def one(tmp_path_factory, tiny_pipeline_folder) -> Path:
    """An ETHER adapter of the tiny Stable Diffusion pipeline."""
    targets = {"unet": ATTENTION, "text_encoder": CLIP[:4]}
    return save_adapter(tmp_path_factory.mktemp("one"), tiny_pipeline_folder, "dog", targets, 1)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Three images of a toy."""
    folder = tmp_path_factory.mktemp("photographs")
    for k in range(3):
        subjects()[0].view(k).render().image.save(folder / f"{k}.png")
    return folder


@pytest.fixture
def train(photographs, tiny_pipeline_folder, tmp_path):
    """The DreamBooth script's own main, in this process: train(*flags, output=…) -> (result, output folder).

    Quick settings are given where the test gives none.
    """
    usual = {
        "--pretrained_model_name_or_path": tiny_pipeline_folder,
        "--instance_data_dir": photographs,
        "--instance_prompt": "a photo of sks toy",
        "--max_train_steps": 3,
        "--num_validation_images": 0,
        "--learning_rate": 0.05,
    }
    precision = torch.backends.cuda.matmul.fp32_precision
    yield in_process(dreambooth.main, usual, tmp_path)
    torch.backends.cuda.matmul.fp32_precision = precision
    reset_accelerate()
