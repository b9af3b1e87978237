"""The base model: weights in variants, and an autoencoder from elsewhere."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers.scripts import refusal, same
from helpers.single_file import write_single_file

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


# All weights in one file ------------------------------------------------------------------------------------------


@pytest.fixture
def one_file(tmp_path, tiny_pipeline) -> Path:
    return write_single_file(tiny_pipeline, tmp_path / "model.safetensors")


@pytest.fixture
def configs(tmp_path, tiny_pipeline_folder) -> Path:
    """A pipeline's folder without its weights."""
    weights = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "configs", ignore=weights))


@pytest.fixture
def hub(tmp_path, monkeypatch, configs):
    """The Hub's cache, with the configs of Stable Diffusion 1.5's id; there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    shutil.copytree(configs, model / "snapshots" / "abc")


@pytest.mark.parametrize("place", ["folder", "cache", "named"])
def test_a_base_in_one_file_is_trained_as_its_folder(train, one_file, configs, hub, place):
    sd = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    flags = {"folder": ["--config_name_or_path", configs], "cache": [], "named": ["--config_name_or_path", sd]}[place]
    images = ["--num_validation_images", 1, "--num_inference_steps", 1]
    _, folder = train(BASE, one_file, *flags, *images, output="file")
    assert same(folder, train(*images, output="folder")[1])
    assert (folder / "grid.png").read_bytes() == (folder.parent / "folder" / "grid.png").read_bytes()
    assert f'StableDiffusionPipeline.from_single_file("{one_file}"' in (folder / "README.md").read_text()


def test_a_run_on_one_file_goes_on_wherever_that_lies_and_on_no_other(train, one_file, configs, capsys, wide_file):
    flags = ["--config_name_or_path", configs, "--checkpointing_steps", 1]
    train(BASE, one_file, *flags, "--max_train_steps", 2)
    moved = one_file.rename(one_file.with_name("moved.safetensors"))
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", 3]
    assert len(train(BASE, moved, *flags)[0].losses) == 3
    assert f"{BASE}: was " in refusal(capsys, train, BASE, wide_file, *flags)


@pytest.fixture
def wide_file(tmp_path, tiny_pipeline) -> Path:
    """Other weights in a file."""
    with torch.no_grad():
        for parameter in tiny_pipeline.unet.parameters():  # a fingerprint reads samples of a large file
            parameter.mul_(2)
    return write_single_file(tiny_pipeline, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "no network",
            "needs the configs and tokenizers of stable-diffusion-v1-5/stable-diffusion-v1-5, which cannot",
        ),
        ("pickle", "may run code when it is read; convert it to .safetensors"),
        ("missing", "there is no such file"),
        ("damaged", "cannot be read as .safetensors"),
        ("an adapter", "holds no whole model, none of its names begins with model.diffusion_model."),
        ("a folder", "--config_name_or_path .*: has no effect, .* is no file; drop it"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    train,
    one_file,
    configs,
    tmp_path,
    monkeypatch,
    capsys,
    wider_pipeline_folder,
    one,
    tiny_pipeline_folder,
    kind,
    words,
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    file, flags = one_file, ["--config_name_or_path", configs]
    if kind == "pickle":
        file = one_file.rename(one_file.with_suffix(".ckpt"))
    elif kind == "missing":
        one_file.unlink()
    elif kind == "damaged":
        one_file.write_bytes(one_file.read_bytes()[:100])
    elif kind == "an adapter":
        file = next(Path(one).rglob("*.safetensors")) if Path(one).is_dir() else one
    elif kind == "a folder":
        file = tiny_pipeline_folder
    flags = [] if kind == "no network" else flags
    assert re.search(words, refusal(capsys, train, BASE, file, *flags))


def test_configs_that_do_not_fit_the_file_are_one_error(train, one_file, wider_pipeline_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        train(BASE, one_file, "--config_name_or_path", wider_pipeline_folder)
    *_, line = capsys.readouterr().err.strip().splitlines()  # after the bars of what was loaded
    assert stop.value.code == 2 and f"error: {BASE} {one_file}: cannot be read as a diffusers pipeline" in line
