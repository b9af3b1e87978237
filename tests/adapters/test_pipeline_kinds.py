"""Adapters on every kind of pipeline, and beside what else pipelines do."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.hooks import apply_group_offloading
from helpers.pipelines import ONE_GREY_LEVEL, TwinPipeline, generate, open_pipeline, snapshot
from helpers.zoo import adapt_components, controlnet, ether_layers_of, flux, sdxl, strengths
from PIL import Image

IMAGE = Image.effect_noise((16, 16), 90).convert("RGB")


def test_a_controlnet_is_a_component_like_the_others(tiny_pipeline, tmp_path):
    pipe = controlnet(tiny_pipeline)

    def answer() -> np.ndarray:
        return generate(pipe, image=IMAGE)

    base = answer()
    adapt_components(pipe, "controlnet", "unet", method="ether_plus")
    both = answer()
    pipe.set_adapters("default", {"controlnet": 0.0})
    unet_alone = answer()
    assert not np.array_equal(both, base) and not np.array_equal(unet_alone, both)
    assert strengths(pipe, "controlnet", "default") == {0.0} and strengths(pipe, "unet", "default") == {1.0}
    pipe.set_adapters("default")
    assert np.array_equal(answer(), both)
    pipe.fuse_ether(components=["controlnet"])
    assert np.abs(answer() - both).max() <= ONE_GREY_LEVEL
    pipe.unfuse_ether()
    pipe.save_ether_weights(tmp_path)
    pipe.unload_ether_weights()
    assert np.array_equal(answer(), base)
    pipe.load_ether_weights(tmp_path, "again")
    assert pipe.get_list_adapters() == {"unet": ["again"], "controlnet": ["again"]}
    assert np.array_equal(answer(), both)
    pipe.disable_ether()
    assert np.array_equal(answer(), base)


@pytest.mark.parametrize("build", [sdxl, flux])
def test_pipelines_of_other_families_load_scale_fuse_and_unload(build, tiny_pipeline, tmp_path):
    pipe = build(tiny_pipeline)
    components = ["transformer"] if build is flux else ["unet", "text_encoder", "text_encoder_2"]
    scale = "joint_attention_kwargs" if build is flux else "cross_attention_kwargs"

    def answer(**options) -> np.ndarray:
        return generate(pipe, height=16, width=16, **options)

    for component in components:  # as an adapter leaves them: PyTorch has another product for weights that train
        getattr(pipe, component).requires_grad_(False)
    base = answer()
    adapt_components(pipe, *components, method="ether")
    full = answer()
    assert not np.array_equal(full, base)
    pipe.set_adapters("default", 0.4)
    weaker = answer()
    pipe.set_adapters("default")
    # Diffusers scales a text encoder by a call's factor as it does a denoiser, where its encode_prompt looks at it.
    np.testing.assert_allclose(answer(**{scale: {"scale": 0.4}}), weaker, atol=ONE_GREY_LEVEL)
    assert np.array_equal(answer(**{scale: {"scale": 0.0}}), base)
    assert np.array_equal(answer(), full)
    pipe.fuse_ether()
    assert np.abs(answer() - full).max() <= ONE_GREY_LEVEL
    pipe.save_ether_weights(tmp_path)
    pipe.unload_ether_weights()
    assert np.array_equal(answer(), base)
    pipe.load_ether_weights(tmp_path)
    assert set(pipe.get_list_adapters()) == set(components)
    assert np.array_equal(answer(), full)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_an_adapter_of_text_to_image_loads_onto_other_tasks(kind, trained, tiny_pipeline_folder):
    pipe = kind.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": IMAGE, "strength": 1.0}
    if kind is StableDiffusionInpaintPipeline:
        options |= {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}
    base = generate(pipe, **options)
    pipe.load_ether_weights(trained.ether_state_dict())
    assert not np.array_equal(generate(pipe, **options), base)
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe, **options), base)


def test_pipelines_without_lora_methods_switch_too(tiny_pipeline):
    twins = TwinPipeline(tiny_pipeline.unet, copy.deepcopy(tiny_pipeline.unet))
    assert twins.get_list_adapters() == {} and twins.get_active_adapters() == []
    adapt_components(twins, "unet", "unet_2", name="dog")
    twins.set_adapters("dog", {"unet": 0.5, "unet_2": 0.25})
    assert strengths(twins, "unet", "dog") == {0.5} and strengths(twins, "unet_2", "dog") == {0.25}
    assert twins.get_active_adapters() == ["dog"]
    twins.delete_adapters("dog")
    assert not hasattr(twins.unet, "peft_config") and not ether_layers_of(twins)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_a_group_offloaded_denoiser_takes_and_gives_back_an_adapter(kind, trained, tiny_pipeline_folder):
    picture, pipe = generate(trained), open_pipeline(tiny_pipeline_folder)
    base = generate(pipe)
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type=kind, num_blocks_per_group=1)
    pipe.load_ether_weights(trained.ether_state_dict())
    assert np.abs(generate(pipe) - picture).max() <= ONE_GREY_LEVEL
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe), base)


def test_textual_inversion_and_ether_share_a_text_encoder(trained, tiny_pipeline_folder):
    fresh = open_pipeline(tiny_pipeline_folder)
    before = snapshot(fresh)["unet"]
    fresh.load_ether_weights(trained.ether_state_dict())
    fresh.load_textual_inversion({"<sks>": torch.ones(16)}, token="<sks>")

    def generate_it() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return fresh("a <sks>", num_inference_steps=3, generator=generator, output_type="np").images[0]

    adapted = generate_it()
    fresh.unload_textual_inversion("<sks>")
    assert not np.array_equal(generate_it(), adapted)
    assert np.array_equal(generate(fresh), generate(trained))
    fresh.unload_ether_weights()
    assert snapshot(fresh)["unet"][0] == before[0]


def test_the_strength_survives_a_call_with_scale_zero_on_every_component(trained):
    trained.set_adapters("default", {"unet": 0.6, "text_encoder": 0.3})
    before = generate(trained)
    generate(trained, cross_attention_kwargs={"scale": 0.0})
    assert np.array_equal(generate(trained), before)


def test_a_saved_folder_goes_to_the_hub(trained, tmp_path, monkeypatch):
    calls = []

    class Hub:  # in place of the network
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append((repo_id, private, exist_ok))
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message, create_pr):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir()), commit_message, create_pr))

    monkeypatch.setattr("ether_diffusion.adapters.pipeline.HfApi", Hub)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "README.md").write_text("a card")
    trained.save_ether_weights(tmp_path / "dog")
    assert not calls
    trained.save_ether_weights(tmp_path / "dog", push_to_hub=True, private=True, token="secret")
    files = ["README.md", "pytorch_ether_weights.safetensors"]
    assert calls == ["secret", ("dog", True, True), ("me/dog", files, "Upload ETHER adapter", False)]
