"""A control adapter of FLUX.1 as a LoRA of diffusers' own control pipeline."""

import re

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline
from helpers.flow_control import IMAGE, OTHER, conv_encoder, latent_encoder, make_control
from helpers.lora import run_command
from helpers.pipelines import ONE_GREY_LEVEL
from safetensors.torch import load_file

from ether_diffusion import EtherConfig
from ether_diffusion.commands import export as export_command
from ether_diffusion.commands import main as cli
from ether_diffusion.control.pipelines import over
from ether_diffusion.export.lora import export_lora

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]
NOISE = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))


def certain(vae):
    """An autoencoder whose distributions are points: the stock pipeline draws latents, ours are modes."""
    last = vae.encoder.conv_out
    half = last.out_channels // 2
    with torch.no_grad():
        last.weight[half:] = 0
        last.bias[half:] = -30
    return vae


@pytest.fixture
def pipe(tmp_path):
    """With an adapter of control: ETHER+ and an encoder of latents."""
    pipe = make_control("flux", tmp_path)
    certain(pipe.vae)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(EtherConfig(method="ether_plus", init_weights=False, target_modules=LAYERS), "edges")
    pipe.add_control("edges", latent_encoder(pipe))
    return pipe


def generate(pipe, image=IMAGE, **options):
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 32, "latents": NOISE}
    return pipe(prompt="a dog", control_image=image, output_type="np", **given, **options).images[0]


def opened(pipe, folder, lora) -> FluxControlPipeline:
    base = over(FluxPipeline, pipe)
    base.unload_ether_weights()
    base.save_pretrained(folder)
    stock = FluxControlPipeline.from_pretrained(folder)
    stock.load_lora_weights(lora)
    return stock


@pytest.mark.parametrize("targets", [None, [*LAYERS, "x_embedder"]], ids=["attention", "first layer too"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_stock_control_pipeline_generates_the_same_image(pipe, tmp_path, targets, strength):
    if targets is not None:
        pipe.transformer.delete_adapters("edges")
        config = EtherConfig(method="ether_plus", init_weights=False, target_modules=targets)
        pipe.transformer.add_adapter(config, "edges")
    pipe.set_adapters("edges", strength)
    wanted, other = generate(pipe), generate(pipe, OTHER)
    report = export_lora(pipe, tmp_path / "lora", to="diffusers-lora")
    assert max(report.errors.values()) < 1e-6 and report.strengths == {"edges": [strength]}
    assert "FluxControlPipeline widens it" in str(report)
    rank = 16 if targets is None else 20
    assert report.ranks["transformer.x_embedder"] == rank
    stock = opened(pipe, tmp_path / "base", tmp_path / "lora")
    assert stock.transformer.config.in_channels == 32
    assert np.abs(generate(stock) - wanted).max() <= ONE_GREY_LEVEL
    assert np.abs(generate(stock, OTHER) - other).max() <= ONE_GREY_LEVEL
    assert np.abs(wanted - other).max() > ONE_GREY_LEVEL


def test_an_encoder_alone_is_exported(pipe, tmp_path):
    pipe.delete_adapters("edges")
    pipe.add_control("edges", latent_encoder(pipe))
    wanted = generate(pipe)
    report = export_lora(pipe, tmp_path / "lora", to="diffusers-lora")
    assert list(report.ranks) == ["transformer.x_embedder"]
    (file,) = (tmp_path / "lora").iterdir()
    down = load_file(file)["transformer.x_embedder.lora_A.weight"]
    assert torch.equal(down, torch.cat([torch.zeros(16, 16), torch.eye(16)], 1))
    assert np.abs(generate(opened(pipe, tmp_path / "base", tmp_path / "lora")) - wanted).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("to", ["kohya", "peft-lora"])
def test_other_formats_have_no_place_for_the_columns(pipe, tmp_path, to):
    with pytest.raises(ValueError, match="edges: holds a control encoder, which would be lost"):
        export_lora(pipe, tmp_path / "lora", to=to)
    assert not list(tmp_path.glob("lora/*"))


def test_encoders_of_images_of_other_families_or_several_at_once_are_refused(pipe, tmp_path):
    pipe.add_control("map", latent_encoder(pipe, seed=4))
    with pytest.raises(ValueError, match="edges, map: have a control encoder each, .* takes one control image"):
        export_lora(pipe, tmp_path / "lora", to="diffusers-lora")
    pipe.delete_adapters("map")
    pipe.add_control("map", conv_encoder(pipe))
    with pytest.raises(ValueError, match="holds a control encoder, which would be lost"):
        export_lora(pipe, tmp_path / "lora", to="diffusers-lora")
    other = make_control("sd3", tmp_path)
    other.add_control("edges", latent_encoder(other))
    with pytest.raises(ValueError, match="edges: holds a control encoder, which would be lost"):
        export_lora(other, tmp_path / "lora", to="diffusers-lora")
    assert not list(tmp_path.glob("lora/*"))


def test_the_command_takes_what_training_has_left(pipe, tmp_path, capsys):
    wanted = generate(pipe)
    pipe.save_ether_weights(tmp_path / "adapter", "edges")
    base = over(FluxPipeline, pipe)
    base.unload_ether_weights()
    base.save_pretrained(tmp_path / "base")
    given = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "lora"]
    run_command(export_command, ["--to", "diffusers-lora", *map(str, given)])
    stock = FluxControlPipeline.from_pretrained(tmp_path / "base")
    stock.load_lora_weights(tmp_path / "lora")
    assert np.abs(generate(stock) - wanted).max() <= ONE_GREY_LEVEL
    for command in (["export", "--to", "kohya"], ["merge"]):
        given[-1] = tmp_path / "other"
        assert cli.main([*command, *map(str, given)]) == 1
        assert re.search("holds a control encoder, which a .* has no place for", capsys.readouterr().err)
        assert not (tmp_path / "other").exists()
