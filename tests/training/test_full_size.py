"""Stable Diffusion 1.5 at its real size, with random weights: the training scripts, and stock pipelines after them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers.control_data import write
from helpers.scripts import CONTROLNET, DREAMBOOTH, launch
from helpers.tiny import make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.adapters.schema import WEIGHTS_NAME

pytestmark = pytest.mark.slow

UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # the rest are the class's own defaults
TEXT_ENCODER = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, projection_dim=768,
)  # fmt: skip
VAE = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    """A folder in the layout and at the size of Stable Diffusion 1.5, in float16 to spare the disk."""
    folder = tmp_path_factory.mktemp("full size")
    tokenizer = make_tokenizer(folder / "letters")
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET).half(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**TEXT_ENCODER, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        ).half(),
        vae=AutoencoderKL(**VAE).half(),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "stable-diffusion")
    return folder / "stable-diffusion"


LOAD = """
import sys, torch, ether_diffusion
from diffusers import StableDiffusionPipeline
from ether_diffusion.tuner.layer import EtherLayer
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.load_ether_weights(sys.argv[2])
layers = [module for module in pipe.unet.modules() if isinstance(module, EtherLayer)]
print(len(layers), sum(vector.numel() for layer in layers for vector in layer.ether_u.values()))
"""


def test_two_steps_at_full_size_give_an_adapter_that_the_stock_pipeline_loads(stable_diffusion, tmp_path):
    for k in range(2):
        Image.effect_noise((80, 64), 90).convert("RGB").save(tmp_path / f"{k}.png")
    flags = ["--pretrained_model_name_or_path", str(stable_diffusion), "--instance_data_dir", str(tmp_path)]
    flags += ["--instance_prompt", "a photo of sks dog", "--output_dir", str(tmp_path / "dog"), "--method", "ether"]
    flags += ["--max_train_steps", "2", "--resolution", "64", "--num_validation_images", "0"]
    done = launch(DREAMBOOTH, *flags)
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "dog" / WEIGHTS_NAME)
    assert len(tensors) == 128 and sum(tensor.numel() for tensor in tensors.values()) == 99_456
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(stable_diffusion), str(tmp_path / "dog")], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-2:] == ["128", "99456"]


@pytest.mark.parametrize(
    ("control_type", "count"),
    [
        ("light", 1_086_480 + 99_456),  # the encoder, and a vector in each attention projection
        ("controlnet", 1_086_480 + 11_479_680 + 45_312),  # the stem, thirteen zero convolutions, half the vectors
    ],
)
def test_two_steps_of_control_at_full_size(stable_diffusion, tmp_path, control_type, count):
    data = write(tmp_path / "data", sizes=((64, 64), (80, 64)))
    flags = ["--pretrained_model_name_or_path", stable_diffusion, "--train_data_dir", data, "--method", "ether"]
    flags += ["--output_dir", tmp_path / "maps", "--max_train_steps", 2, "--resolution", 64]
    flags += ["--train_batch_size", 1, "--num_validation_images", 0, "--control_type", control_type]
    done = launch(CONTROLNET, *flags, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert f"ETHER: {count} parameters" in done.stderr
    tensors = load_file(tmp_path / "maps" / WEIGHTS_NAME)
    assert sum(tensor.numel() for tensor in tensors.values()) == count
    if control_type == "controlnet":
        controlnet = ControlNetModel.from_pretrained(tmp_path / "maps" / "controlnet")
        assert sum(parameter.numel() for parameter in controlnet.parameters()) == 361_279_120
