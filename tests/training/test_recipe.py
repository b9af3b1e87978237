"""Recipes: what they ask for fits, is a command that training takes, and rests on figures that can be checked."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ether_diffusion.commands.main import main
from ether_diffusion.errors import InputError
from ether_diffusion.training.activations import kept_values, width_of
from ether_diffusion.training.dreambooth import Options
from ether_diffusion.training.families import families
from ether_diffusion.training.full_size import MODELS, denoiser_of
from ether_diffusion.training.options import parse_options
from ether_diffusion.training.recipe import GIB, VAE_CHANNELS, VAE_MAPS, choices, parts_of, recipe, trained_count

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BILLIONS = {
    "sd15": 0.86, "sdxl": 2.57, "sd35-medium": 2.24, "sd35-large": 8.06, "flux1": 11.9, "flux2-klein": 3.88,
    "flux2-klein-9b": 9.08, "flux2-dev": 32.2, "qwen-image": 20.4, "z-image": 6.15, "chroma": 8.9, "lumina2": 2.61,
    "sana": 1.6,
}  # fmt: skip
cards = st.floats(1, 200)
models = st.sampled_from(list(MODELS))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_of_the_size_that_is_published_and_of_a_family_that_is_trained(name):
    model, parameters = MODELS[name], list(denoiser_of(name).parameters())
    assert sum(each.numel() for each in parameters) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    assert families()[model.pipeline].is_flow != model.is_unet
    assert all(each.is_meta for each in parameters)


def test_what_is_trained_is_counted_as_the_training_counts_it():
    assert trained_count("sd15") == 398_592 and trained_count("sdxl") == 2_903_040
    assert not any(".ether_" in name for name, _ in denoiser_of("sd15").named_parameters())


@settings(max_examples=40, deadline=None)
@given(name=models, vram=cards, images=st.integers(1, 500))
def test_a_recipe_fits_the_card_or_says_what_does(name, vram, images):
    try:
        found = recipe(model=name, vram=vram, images=images)
    except InputError as error:
        assert str(error).startswith(f"--vram {vram:g}: {name} needs ") and " on this card " in str(error)
        return
    assert found.peak <= vram * GIB and sum(found.parts.values()) < found.peak
    assert found.settings.batch <= images and found.flags["max_train_steps"] >= 200


@settings(max_examples=40, deadline=None)
@given(name=models, low=cards, more=cards)
def test_a_larger_card_never_gets_smaller_images(name, low, more):
    def side(vram: float) -> int:
        try:
            return recipe(model=name, vram=vram, images=8).settings.side
        except InputError:
            return 0

    assert side(low) <= side(low + more)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_is_one_that_the_training_takes(name):
    found = recipe(model=name, vram=60, images=8)
    words = shlex.split(found.command.replace("\\\n", " "))
    assert words[:4] == ["accelerate", "launch", "-m", "ether_diffusion.training.dreambooth"]
    options = parse_options(Options, words[4:])
    assert options.model.pretrained_model_name_or_path == MODELS[name].hub_id
    assert options.performance.quantize == found.settings.quantize
    assert options.performance.gradient_checkpointing == found.settings.checkpointing
    assert set(found.reasons) <= set(found.flags)


def test_each_thing_that_saves_memory_saves_it():
    sizes = {}
    for each in choices(MODELS["flux1"], 8):
        sizes[each.side, each.batch, each.checkpointing, each.quantize] = sum(parts_of("flux1", each).values())
    assert sizes[1024, 1, True, None] < sizes[1024, 1, False, None] < sizes[1024, 2, False, None]
    assert sizes[1024, 1, True, "nf4"] < sizes[1024, 1, True, "int8"] < sizes[1024, 1, True, None]
    assert sizes[512, 1, True, "nf4"] < sizes[768, 1, True, "nf4"] < sizes[1024, 1, True, "nf4"]


def kept_bytes(model: FluxTransformer2DModel, tokens: int, text: int) -> int:
    """Bytes of the tensors that a real forward pass keeps for the backward pass, each storage once."""
    config, held = model.config, {}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = model(
            hidden_states=torch.randn(1, tokens, config.in_channels, requires_grad=True),
            encoder_hidden_states=torch.randn(1, text, config.joint_attention_dim),
            pooled_projections=torch.randn(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(tokens, 3),
            txt_ids=torch.zeros(text, 3),
        )
    assert answer.sample.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_formula_of_activations_is_near_what_a_real_pass_keeps(checkpointing):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=3, num_single_layers=6, attention_head_dim=16, num_attention_heads=8, joint_attention_dim=64,
        pooled_projection_dim=32, in_channels=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    ).requires_grad_(False).train()  # fmt: skip
    if checkpointing:
        model.enable_gradient_checkpointing()
    tokens, text = 192, 64
    told = 4 * kept_values(model, tokens + text, checkpointing=checkpointing)
    if checkpointing:  # what one block makes anew comes in the backward pass
        told -= 4 * (tokens + text) * width_of(model.config) * 17
    measured = kept_bytes(model, tokens, text)
    assert 0.6 * measured <= told <= 1.8 * measured, (told, measured)


def test_the_figures_of_unets_are_those_of_the_benchmark():
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"]
    for name, workload in (("sd15", "sd15-512"), ("sdxl", "sdxl-1024")):
        model = MODELS[name]
        weights = 2 * (sum(model.text_encoders) + model.vae + sum(p.numel() for p in denoiser_of(name).parameters()))
        for row in (row for row in rows if (row["workload"], row["method"]) == (workload, "ether_plus")):
            beside = row["weights"] + row["trained_and_optimizer"]
            if row["cached"]:
                made = (row["peak"] - beside) / model.native_side**2
                assert model.bytes_of_a_pixel[row["gradient_checkpointing"]] == pytest.approx(made, rel=0.01)
            else:
                assert row["weights"] == pytest.approx(weights, rel=0.01)
                told = VAE_MAPS * VAE_CHANNELS * model.vae_bytes * model.native_side**2
                assert row["encoding"] - beside <= told <= 1.4 * (row["encoding"] - beside)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model sd9 --vram 8", "--model sd9: there is no recipe for it; there are sd15, sdxl, "),
        ("--model flux2-dev --vram 8", "--vram 8: flux2-dev needs "),
        ("--model sd15 --vram 0", "--vram: got 0, needs the gigabytes of a card"),
        ("--model sd15 --vram nan", "--vram: got nan"),
        ("--model sd15 --vram 8 --images 0", "--images: got 0, needs a whole number from 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(flags, told, capsys):
    assert main(["recipe", *flags.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ether-diffusion: error: {told}")


def test_the_command_prints_the_launch_command_the_memory_and_the_reasons(capsys):
    assert main("recipe --model black-forest-labs/FLUX.2-klein-base-4B --vram 12 --images 8".split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("accelerate launch -m ether_diffusion.training.dreambooth")
    for words in ("denoiser", "activations", "while prompts are encoded", "gradient_checkpointing", "would not fit"):
        assert words in printed
