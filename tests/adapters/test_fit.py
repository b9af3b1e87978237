"""A file against a pipeline: which parts of it are loaded, where the pipeline has some of its components alone."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import zoo
from helpers.control import make_encoder, open_control
from helpers.pipelines import TwinPipeline, adapt, assert_unchanged, generate, open_pipeline, snapshot
from peft import get_peft_model

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.schema import WEIGHTS_NAME


@pytest.fixture
def file(one):
    return one / WEIGHTS_NAME


def names(pipe) -> list[str]:
    return pipe.ether_adapters["dog"].components


@pytest.mark.parametrize("hotswap", [False, True])
def test_one_pipeline_encodes_and_another_denoises_with_the_parts_of_one_file(file, tiny_pipeline_folder, hotswap):
    whole = open_pipeline(tiny_pipeline_folder)
    whole.load_ether_weights(file)
    image = generate(whole)
    without_text = {"text_encoder": None, "tokenizer": None}
    encoding = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, unet=None, vae=None)
    denoising = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, **without_text)
    denoising.set_progress_bar_config(disable=True)
    for pipe, component in ((encoding, "text_encoder"), (denoising, "unet")):
        with pytest.raises(ValueError, match=rf"does not have; .*; components=\['{component}'\] loads what is for"):
            pipe.load_ether_weights(file, "dog")
        pipe.load_ether_weights(file, "dog", components=[component])
        if hotswap:
            pipe.load_ether_weights(file, "dog", components=[component], hotswap=True)
        assert names(pipe) == [component]
        pipe.set_adapters("dog", {"unet": 1.0, "text_encoder": 1.0})
    positive, negative = encoding.encode_prompt("a dog", "cpu", 1, True)
    generator = torch.Generator().manual_seed(0)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "generator": generator}
    assert np.array_equal(denoising(num_inference_steps=3, output_type="np", **embeds).images[0], image)


@pytest.mark.parametrize("form", [str, lambda name: [name], lambda name: (name,), lambda name: {name}])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_component_that_is_not_named_stays_as_it_is(file, tiny_pipeline_folder, tmp_path, form, component):
    pipe = open_pipeline(tiny_pipeline_folder)
    before = snapshot(pipe)
    pipe.load_ether_weights(file, "dog", components=form(component))
    assert {key.partition(".")[0] for key in pipe.ether_state_dict()} == {component}
    again = open_pipeline(tiny_pipeline_folder)
    again.load_ether_weights(pipe.save_ether_weights(tmp_path / "part"), "dog")
    assert names(again) == [component] and again.ether_adapters["dog"].other_base == []
    pipe.unload_ether_weights()
    assert_unchanged(pipe, before)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (["vae"], "components: vae: .* can be loaded onto .*unet"),
        (["unet", "unett"], "components: unett: .* can be loaded onto .*unet"),
        ("unett", "components: unett: "),
        ([], "components: no name: "),
        ([None], r"components=\[None\]: a name fits, or a list of names"),
    ],
)
@pytest.mark.parametrize("hotswap", [False, True])
def test_a_component_of_which_the_file_holds_nothing_is_one_error(
    file, tiny_pipeline_folder, components, message, hotswap
):
    pipe = open_pipeline(tiny_pipeline_folder)
    if hotswap:
        pipe.load_ether_weights(file, "dog")
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.load_ether_weights(file, "dog", components=components, hotswap=hotswap)
    assert_unchanged(pipe, before)


def test_the_name_says_where_a_file_of_peft_belongs_that_fits_several(tiny_pipeline, tiny_pipeline_folder, tmp_path):
    torch.manual_seed(0)
    peft_model = get_peft_model(tiny_pipeline.unet, EtherConfig(target_modules=["to_q"]))
    peft_model.save_pretrained(tmp_path)
    pipe = TwinPipeline(open_pipeline(tiny_pipeline_folder).unet, open_pipeline(tiny_pipeline_folder).unet)
    with pytest.raises(ValueError, match="fits several components"):
        pipe.load_ether_weights(tmp_path, "dog")
    with pytest.raises(ValueError, match="components: text_encoder: .* can be loaded onto unet, unet_2"):
        pipe.load_ether_weights(tmp_path, "dog", components="text_encoder")
    pipe.load_ether_weights(tmp_path, "dog", components="unet_2")
    assert names(pipe) == ["unet_2"]


def test_parts_besides_vectors_are_named_as_well(tiny_pipeline_folder, tmp_path):
    pipe = open_control(tiny_pipeline_folder)
    adapt(pipe, name="dog").add_control("dog", make_encoder(pipe))
    file = pipe.save_ether_weights(tmp_path / "light")
    stock = open_pipeline(tiny_pipeline_folder)
    stock.load_ether_weights(file, "dog", components=["unet", "text_encoder"])  # of which it applies no encoder
    assert set(names(stock)) == {"unet", "text_encoder"}
    with_encoder = open_control(tiny_pipeline_folder)
    with_encoder.load_ether_weights(file, "dog", components="control_encoder")
    assert names(with_encoder) == ["control_encoder"]
    file = zoo.save_control("controlnet", tiny_pipeline_folder, tmp_path / "controlnet")
    with pytest.raises(ValueError, match="components: unet: .* can be loaded onto controlnet"):
        stock.load_ether_weights(file, "cat", components="unet")
