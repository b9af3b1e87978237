"""Control pipelines: what they generate, and the encoders that they hold."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from helpers import zoo
from helpers.control import IMAGE, OTHER, make_encoder, same
from helpers.pipelines import adapt, assert_unchanged, generate, snapshot
from peft import LoraConfig
from PIL import Image

from ether_diffusion import (
    ControlEncoder,
    EtherConfig,
    EtherControlPipeline,
    EtherControlXLPipeline,
    inject,
)


def test_an_untrained_encoder_changes_nothing_and_a_trained_one_does(pipe, tiny_pipeline):
    stock = generate(adapt(tiny_pipeline, num_blocks=2))
    assert same(generate(pipe), stock)
    assert same(generate(pipe, control_image=IMAGE, controlnet_conditioning_scale=0.0), stock)
    controlled = generate(pipe, control_image=IMAGE)
    assert not np.allclose(controlled, stock, atol=1e-3)
    assert not np.allclose(controlled, generate(pipe, control_image=OTHER), atol=1e-3)
    assert same(generate(pipe), stock)
    pipe.controls["default"].encoder = make_encoder(pipe, seed=None)
    assert same(generate(pipe, control_image=IMAGE), stock)


def test_a_image_of_another_size_generates_as_the_resized_one(pipe):
    large = IMAGE.resize((32, 48), Image.NEAREST)
    assert same(generate(pipe, control_image=large), generate(pipe, control_image=IMAGE))
    assert generate(pipe, control_image=IMAGE, height=24, width=8).shape == (24, 8, 3)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_prompts_and_copies_each_follow_their_own_image(pipe, encoder_calls, guidance):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "np"}
    together = pipe(
        ["a dog", "a cat"], control_image=[IMAGE, OTHER], num_images_per_prompt=2, latents=latents, **options
    ).images
    assert encoder_calls == [(2, 3, 16, 16)]
    for k, (prompt, picture) in enumerate([("a dog", IMAGE)] * 2 + [("a cat", OTHER)] * 2):
        alone = pipe(prompt, control_image=picture, latents=latents[k : k + 1], **options).images[0]
        assert np.allclose(together[k], alone, atol=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8)])
@pytest.mark.parametrize("from_image", [False, True])
def test_the_control_acts_in_the_same_steps_as_a_controlnet(
    pipe, tiny_pipeline, encoder_calls, monkeypatch, start, end, from_image
):
    ours, theirs = [], []

    def watching(unet, features, **options):
        return inject(unet, lambda: ours.append((now := features()) is not None) or now, **options)

    monkeypatch.setattr("ether_diffusion.control.pipelines.inject", watching)
    options = {"prompt": "a dog", "num_inference_steps": 10, "output_type": "latent"}
    options |= {"control_guidance_start": start, "control_guidance_end": end}
    stock = zoo.controlnet(tiny_pipeline)
    stock.controlnet.register_forward_pre_hook(
        lambda m, a, k: theirs.append(k["conditioning_scale"] != 0), with_kwargs=True
    )
    if from_image:
        pictures = {"image": IMAGE, "control_image": IMAGE}
        stock = zoo.quiet(StableDiffusionControlNetImg2ImgPipeline(**stock.components, requires_safety_checker=False))
        stock(**pictures, strength=0.6, **options)
        pipe(**pictures, strength=0.6, **options)
    else:
        stock(image=IMAGE, **options)
        pipe(control_image=IMAGE, **options)
    assert ours == theirs
    assert len(ours) == (6 if from_image else 10)
    assert encoder_calls == [(1, 3, 16, 16)]


def test_image_to_image_is_the_stock_one_and_control_changes_it(pipe):
    stock = zoo.quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    wanted = generate(stock, image=OTHER, strength=0.8)
    assert same(generate(pipe, image=OTHER), wanted)
    assert not np.allclose(generate(pipe, image=OTHER, control_image=IMAGE), wanted, atol=1e-3)
    wide = IMAGE.resize((24, 16))
    assert generate(pipe, image=wide, control_image=IMAGE, strength=1.0).shape == (16, 24, 3)


def test_several_encoders_add_up_each_by_its_scale_and_weight(pipe, encoder_calls):
    pipe.add_control("other", make_encoder(pipe, seed=4))
    pictures = {"default": IMAGE, "other": OTHER}
    both = generate(pipe, control_image=pictures, controlnet_conditioning_scale={"default": 0.5, "other": 0.25})
    assert len(encoder_calls) == 2
    pipe.set_adapters(["default", "other"], [{"control_encoder": 0.5}, 0.25])
    assert np.allclose(generate(pipe, control_image=pictures), both, atol=1e-4)
    with pytest.raises(ValueError, match="other is active, but has no image"):
        generate(pipe, control_image={"default": IMAGE})
    with pytest.raises(ValueError, match=r"several .*\(default, other\): pass control_image as name -> image"):
        generate(pipe, control_image=IMAGE)
    pipe.set_adapters("default")
    assert pipe.get_active_adapters() == ["default"]
    alone = generate(pipe, control_image=IMAGE)
    assert not np.allclose(alone, both, atol=1e-3)
    pipe.set_adapters(["default", "other"])
    without = generate(pipe, control_image={"default": IMAGE}, controlnet_conditioning_scale={"other": 0})
    assert same(without, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_image": [IMAGE, OTHER]}, "got 2 images for 1 prompts"),
        ({"control_image": {"cat": IMAGE}}, "cat is no active control encoder; active are default"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": {"cat": 1.0}}, "no control encoder cat"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": float("nan")}, "finite numbers fit"),
        ({"control_image": IMAGE, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "is not before"),
        ({"control_image": IMAGE, "control_guidance_end": 2}, "from 0 to 1 fits"),
        ({"control_image": IMAGE, "height": 15}, "multiples of 2"),
        ({"control_imgae": IMAGE}, "control_imgae: text-to-image takes no such argument"),
        ({"image": IMAGE, "height": 8}, "height: image-to-image takes no such argument"),
        ({"strength": 0.5}, "has no effect without image"),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_sentence(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, **options)


def test_a_control_image_needs_an_active_encoder(plain):
    with pytest.raises(ValueError, match="holds no control encoder"):
        generate(plain, control_image=IMAGE)
    plain.add_control("edges", make_encoder(plain))
    plain.set_adapters([])
    with pytest.raises(ValueError, match="no control encoder is active; loaded are edges: set_adapters"):
        generate(plain, control_image=IMAGE)


def test_callbacks_see_every_step_and_may_stop(pipe):
    steps = []

    def stop_after_two(painter, step, timestep, tensors):
        steps.append(step)
        painter._interrupt = step == 1
        return tensors

    generate(pipe, control_image=IMAGE, callback_on_step_end=stop_after_two)
    generate(pipe, control_image=IMAGE, image=OTHER, strength=1.0, callback_on_step_end=stop_after_two)
    assert steps == [0, 1, 0, 1]


def test_any_stable_diffusion_checkpoint_becomes_a_control_pipeline_and_shares_what_it_holds(tiny_pipeline, pipe):
    opened = zoo.quiet(EtherControlPipeline.from_pipe(tiny_pipeline))
    assert opened.unet is tiny_pipeline.unet and not opened.controls
    assert same(generate(opened), generate(tiny_pipeline))
    again = zoo.quiet(EtherControlPipeline.from_pipe(pipe))
    assert same(generate(again, control_image=IMAGE), generate(pipe, control_image=IMAGE))
    again.delete_adapters("default")
    assert not pipe.controls


def test_a_saved_control_pipeline_is_the_stock_one(pipe, tmp_path):
    pipe.unload_ether_weights()
    pipe.save_pretrained(tmp_path)
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not any("control" in name for name in index)


def test_an_encoder_comes_and_goes_with_its_adapter(plain):
    before, stock = snapshot(plain), generate(plain)
    adapt(plain, name="dog")
    plain.add_control("dog", make_encoder(plain))
    plain.add_control("edges", make_encoder(plain, seed=4))
    assert plain.get_list_adapters() == {
        "unet": ["dog"], "text_encoder": ["dog"], "control_encoder": ["dog", "edges"]
    }  # fmt: skip
    assert set(plain.get_active_adapters()) == {"dog", "edges"}
    plain.delete_adapters("dog")
    assert plain.get_active_adapters() == ["edges"]
    with pytest.raises(ValueError, match="no adapter dog; loaded are edges"):
        plain.set_adapters(["dog"])
    plain.unload_ether_weights()
    assert_unchanged(plain, before)
    assert not plain.controls and same(generate(plain), stock)


@pytest.mark.parametrize("config", [EtherConfig(init_weights=False), LoraConfig(init_lora_weights=False)])
def test_an_encoder_alone_may_be_the_active_adapter(plain, config):
    stock = generate(plain)
    config.target_modules = {"to_q"}
    plain.unet.add_adapter(config, "vectors")
    plain.add_control("edges", make_encoder(plain))
    adapted = generate(plain)
    plain.set_adapters("edges")
    assert plain.get_active_adapters() == ["edges"]
    assert same(generate(plain), stock) and not same(generate(plain, control_image=IMAGE), stock)
    plain.set_adapters(["vectors", "edges"], [1.0, 0.0])
    assert same(generate(plain), adapted) and same(generate(plain, control_image=IMAGE), adapted)
    plain.delete_adapters("vectors")
    assert plain.get_list_adapters() == {"control_encoder": ["edges"]}


def test_prompts_may_come_as_embeddings(pipe):
    text, nothing = (each.repeat(2, 1, 1) for each in pipe.encode_prompt("a dog", "cpu", 1, True))
    options = {"prompt_embeds": text, "negative_prompt_embeds": nothing, "num_inference_steps": 1}
    assert len(pipe(control_image=[IMAGE, OTHER], **options).images) == 2
    with pytest.raises(ValueError, match="got 3 images for 2 prompts"):
        pipe(control_image=[IMAGE] * 3, **options)


def test_resting_and_fused_adapters_with_an_encoder(pipe):
    plain_image, controlled = generate(pipe), generate(pipe, control_image=IMAGE)
    pipe.disable_ether()
    assert not np.allclose(generate(pipe, control_image=IMAGE), controlled, atol=1e-3)
    assert same(generate(pipe, control_image=IMAGE), generate(pipe))
    pipe.enable_ether()
    assert same(generate(pipe, control_image=IMAGE), controlled)
    pipe.fuse_ether()
    assert np.allclose(generate(pipe, control_image=IMAGE), controlled, atol=1e-3)
    assert np.allclose(generate(pipe), plain_image, atol=1e-3)
    pipe.unfuse_ether()
    assert same(generate(pipe, control_image=IMAGE), controlled)


def test_encoders_follow_the_pipeline_to_another_dtype(pipe):
    pipe.to(torch.float64)
    assert pipe.controls["default"].encoder.dtype == torch.float64
    assert pipe.set_ether_device("default", "cpu") is None


def test_an_offloaded_pipeline_generates_the_same_image(pipe):
    wanted, from_image = generate(pipe, control_image=IMAGE), generate(pipe, image=OTHER, control_image=IMAGE)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.allclose(generate(pipe, control_image=IMAGE), wanted, atol=1e-5)
    assert np.allclose(generate(pipe, image=OTHER, control_image=IMAGE), from_image, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "name", "message"),
    [
        (ControlEncoder(8, block_out_channels=(4, 4)), "new", "makes 8 channels, .* here 16"),
        (ControlEncoder(16), "new", "8 times smaller, but the autoencoder here 2 times"),
        (ControlEncoder(16, block_out_channels=(4, 4)), "default", "has a control encoder already"),
        (ControlEncoder(16, block_out_channels=(4, 4)), "a.b", "a text without a dot"),
        (torch.nn.Linear(1, 1), "new", "got a Linear, needs a ControlEncoder"),
    ],
)
def test_an_encoder_that_does_not_fit_the_pipeline_is_refused(pipe, encoder, name, message):
    with pytest.raises(ValueError, match=message):
        pipe.add_control(name, encoder)


def test_light_control_of_sdxl(tiny_pipeline):
    parts = zoo.sdxl(tiny_pipeline).components
    pipe = zoo.quiet(EtherControlXLPipeline(**parts, add_watermarker=False))
    stock, from_image = generate(pipe), generate(pipe, image=OTHER)
    pipe.add_control("edges", make_encoder(pipe))
    assert same(generate(pipe), stock)
    assert not np.allclose(generate(pipe, control_image=IMAGE), stock, atol=1e-3)
    assert not np.allclose(generate(pipe, image=OTHER, control_image=IMAGE), from_image, atol=1e-3)
