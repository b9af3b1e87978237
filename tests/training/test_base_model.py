"""The base model: weights in variants, and an autoencoder from elsewhere."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers.scripts import refusal, same

BASE, VAE = "--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path"


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)


@pytest.fixture
def other_vae(tiny_pipeline) -> AutoencoderKL:
    with torch.no_grad():
        for parameter in tiny_pipeline.vae.parameters():
            parameter.mul_(0.9)
    return tiny_pipeline.vae


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_autoencoder_from_elsewhere_takes_the_place_of_the_models_own(train, bases, other_vae, tmp_path, kind):
    base = bases[kind]
    other_vae.save_pretrained(tmp_path / "vae")
    inside = Path(shutil.copytree(base, tmp_path / "inside"))
    shutil.rmtree(inside / "vae")
    other_vae.save_pretrained(inside / "vae")
    images = ["--num_validation_images", 1, "--num_inference_steps", 1]
    given = train(BASE, base, VAE, tmp_path / "vae", *images, output="given")[1]
    whole = train(BASE, inside, *images, output="whole")[1]
    assert same(given, whole) and (given / "grid.png").read_bytes() == (whole / "grid.png").read_bytes()
    assert not same(given, train(BASE, base, output="own")[1])


def test_another_autoencoder_is_another_training(train, other_vae, tmp_path, capsys):
    other_vae.save_pretrained(tmp_path / "vae")
    flags = ["--checkpointing_steps", 1, "--max_train_steps", 2]
    train(*flags)
    error = refusal(capsys, train, *flags, VAE, tmp_path / "vae", "--resume_from_checkpoint", "latest")
    assert f"{VAE}: was 'default'" in error


@pytest.mark.parametrize("kind", ["missing", "a pipeline", "another model", "damaged", "other channels"])
def test_an_autoencoder_that_cannot_be_used_is_one_sentence(
    train, tmp_path, capsys, tiny_pipeline, tiny_pipeline_folder, no_loading, kind
):
    vae = tmp_path / "vae"
    if kind == "a pipeline":
        vae = tiny_pipeline_folder
    elif kind == "another model":
        tiny_pipeline.unet.save_pretrained(vae)
    elif kind == "other channels":
        AutoencoderKL(block_out_channels=(8,), latent_channels=8, norm_num_groups=4).save_pretrained(vae)
    elif kind == "damaged":
        tiny_pipeline.vae.save_pretrained(vae)
        (vae / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": null}')
    error = refusal(capsys, train, VAE, vae)
    assert "the autoencoder makes 8" in error if kind == "other channels" else f"{VAE} {vae}" in error


VARIANTS = {
    "all": ("", "fp16"),
    "unet": ("unet", "fp16"),
    "text encoder": ("text_encoder", "fp16"),
    "another name": ("", "half"),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_folder_with_weights_of_a_variant_alone_names_the_flag(
    train, tmp_path, capsys, tiny_pipeline, tiny_pipeline_folder, no_loading, kind
):
    component, variant = VARIANTS[kind]
    tiny_pipeline.save_pretrained(tmp_path / "variant", variant=variant)
    base = tmp_path / "variant"
    if component:
        base = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "base"))
        shutil.rmtree(base / component)
        shutil.copytree(tmp_path / "variant" / component, base / component)
    assert f"add --variant {variant}" in refusal(capsys, train, BASE, base)


def test_weights_in_parts_have_variants_too(train, tmp_path, capsys, tiny_pipeline):
    tiny_pipeline.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="40KB")
    assert list((tmp_path / "base" / "unet").glob("*.fp16-00001-of-*.safetensors"))
    assert "add --variant fp16" in refusal(capsys, train, BASE, tmp_path / "base")
    tiny_pipeline.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    assert same(train(BASE, tmp_path / "whole", output="parts")[1], train(output="usual")[1])
