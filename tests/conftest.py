"""Small real pipelines, made once per session and saved to disk as `save_pretrained` saves them."""

# ruff: noqa: E402
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pipelines import adapt
from scripts import DREAMBOOTH, load_script, reset_accelerate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ether_diffusion.miniature.world import subjects

for name in ("NO_PROXY", "no_proxy"):  # servers of the tests' own
    os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), "127.0.0.1", "localhost"])
torch.set_num_threads(1)

START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single letters: every text has tokens, none needs a merge."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [f"{letter}</w>" for letter in letters] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=16,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def make_pipeline(tokenizer: CLIPTokenizer, *, width: int = 16, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion in very small, with random weights: 16×16 pixels, 8×8 latents."""
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
def photographs(tmp_path_factory) -> Path:
    """Three pictures of a toy."""
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
    instead = {"--dataset_name": "--instance_data_dir", "--num_train_epochs": "--max_train_steps"}

    def call(*flags: object, output: str = "out"):
        reset_accelerate()
        flags = tuple(map(str, flags))
        given = {*flags, *(replaced for flag, replaced in instead.items() if flag in flags)}
        words = [str(word) for flag, value in usual.items() if flag not in given for word in (flag, value)]
        folder = tmp_path / output
        if "--output_dir" not in flags:
            words += ["--output_dir", str(folder)]
        return load_script(DREAMBOOTH).main([*words, *flags]), folder

    precision = torch.backends.cuda.matmul.fp32_precision
    yield call
    torch.backends.cuda.matmul.fp32_precision = precision
    reset_accelerate()
