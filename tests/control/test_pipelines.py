"""Light control: the encoder, what it adds to a UNet, the pipelines that use it, and the file it is kept in."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from helpers import zoo
from helpers.pipelines import adapt, assert_unchanged, generate, snapshot
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open

from ether_diffusion import (
    ControlEncoder,
    EtherConfig,
    EtherControlPipeline,
    EtherControlXLPipeline,
    EtherFileError,
    inject,
)
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.control.images import control_tensor

WHOLE = ["controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def make_encoder(pipe, seed: int | None = 3, **options) -> ControlEncoder:
    """An encoder that fits; without a seed, untrained."""
    encoder = ControlEncoder.for_unet(pipe.unet, factor=pipe.vae_scale_factor, **options)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def open_control(folder, **options) -> EtherControlPipeline:
    pipe = EtherControlPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def plain(tiny_pipeline_folder) -> EtherControlPipeline:
    return open_control(tiny_pipeline_folder)


@pytest.fixture
def pipe(plain) -> EtherControlPipeline:
    """With one adapter, "default": vectors and an encoder that does something."""
    adapt(plain, num_blocks=2)
    plain.add_control("default", make_encoder(plain))
    return plain


@pytest.fixture
def encoder_calls(pipe, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that encoders are called with."""
    calls, forward = [], ControlEncoder.forward
    monkeypatch.setattr(ControlEncoder, "forward", lambda self, x: calls.append(tuple(x.shape)) or forward(self, x))
    return calls


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)


def call_unet(unet, batch=2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    return unet(latents, 5, torch.randn(batch, 16, 16, generator=generator)).sample


# The encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_an_encoder_reduces_a_image_as_the_autoencoder_does(plain, factor):
    encoder = ControlEncoder.for_unet(plain.unet, factor=factor)
    assert encoder.factor == factor
    assert encoder(torch.rand(2, 3, 32, 48)).shape == (2, 16, 32 // factor, 48 // factor)
    assert encoder.config.block_out_channels[:4] == (16, 32, 96, 256)[: len(encoder.config.block_out_channels)]


@pytest.mark.parametrize(
    ("channels", "factor", "count"),
    [(320, 8, 1_086_480), (80, 4, 113_600)],  # Stable Diffusion of every size, and the miniature
)
def test_an_encoder_has_the_published_number_of_parameters(channels, factor, count):
    encoder = ControlEncoder.for_unet(torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, channels, 3)}), factor)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count


def test_an_encoder_for_an_adapted_unet_reads_through_the_adapter(plain):
    plain.unet.add_adapter(EtherConfig(target_modules=["conv_in"], num_blocks=2))
    assert ControlEncoder.for_unet(plain.unet, 2).config.out_channels == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 0}, "whole numbers from 1"),
        ({"out_channels": 4, "block_out_channels": ()}, "at least one width"),
        ({"out_channels": 4, "interpolation": "cubic"}, "'cubic'.* nearest, lanczos"),
    ],
)
def test_an_encoder_that_cannot_be_built_says_what_fits(options, message):
    with pytest.raises(ValueError, match=message):
        ControlEncoder(**options)
    with pytest.raises(ValueError, match="factor=6: 1, 2, 4"):
        ControlEncoder.for_unet(None, factor=6)
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 8\).*multiples of 2"):
        ControlEncoder(4, block_out_channels=(4, 4))(torch.rand(1, 3, 5, 8))


# Injection ----------------------------------------------------------------------------------------------------


def test_features_are_added_after_the_first_convolution_and_nothing_stays(plain):
    unet, seen = plain.unet, []
    before = call_unet(unet)
    features = torch.randn(1, 16, 8, 8)
    watch = unet.down_blocks[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k["hidden_states"] if "hidden_states" in k else a[0]), with_kwargs=True
    )
    with inject(unet, features):
        changed = call_unet(unet)
    call_unet(unet)
    watch.remove()
    assert torch.allclose(seen[0] - seen[1], features.expand(2, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(changed, before)
    with pytest.raises(RuntimeError, match="stop"), inject(unet, features):
        raise RuntimeError("stop")
    with inject(unet, None), inject(unet, lambda: None):
        assert torch.equal(call_unet(unet), before)
    assert torch.equal(call_unet(unet), before)
    assert not unet.conv_in._forward_hooks


def test_guidance_gets_the_features_once_for_each_half(plain):
    features = torch.randn(2, 16, 8, 8)
    with inject(plain.unet, features):
        doubled = call_unet(plain.unet, 4)
    with inject(plain.unet, features.repeat(2, 1, 1, 1)):
        assert torch.equal(call_unet(plain.unet, 4), doubled)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 8, 8), r"batch of 2.* multiple of the 3 .*\(3, 16, 8, 8\)"),
        ((0, 16, 8, 8), "batch of 2.* multiple of the 0"),
        ((1, 8, 8, 8), r"\(1, 8, 8, 8\) do not fit .*\(2, 16, 8, 8\)"),
        ((1, 16, 4, 4), r"\(1, 16, 4, 4\) do not fit .*\(2, 16, 8, 8\)"),
        ((16, 8, 8), r"\(16, 8, 8\) do not fit"),
    ],
)
def test_features_that_do_not_fit_are_named_with_both_shapes(plain, shape, message):
    with inject(plain.unet, torch.zeros(shape)), pytest.raises(ValueError, match=message):
        call_unet(plain.unet)


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_reach_the_encoder_through_a_checkpointed_unet(plain, adapted):
    if adapted:
        plain.unet.add_adapter(EtherConfig(target_modules=["conv_in"], num_blocks=2, init_weights=False))
    plain.unet.train()
    encoder, hint = make_encoder(plain), torch.rand(2, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            plain.unet.enable_gradient_checkpointing()
        encoder.zero_grad()
        with inject(plain.unet, encoder(hint)):
            call_unet(plain.unet).square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_features_take_the_dtype_of_the_unet(plain):
    plain.unet.to(torch.bfloat16)
    latents, text = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 16, 16).bfloat16()
    with inject(plain.unet, torch.randn(1, 16, 8, 8)):
        assert plain.unet(latents, 5, text).sample.dtype == torch.bfloat16


def test_a_unet_compiled_region_by_region_gets_them_and_a_whole_one_is_refused(plain, monkeypatch):
    features = torch.randn(1, 16, 8, 8)
    with inject(plain.unet, features):
        expected = call_unet(plain.unet)
    for block in plain.unet.down_blocks[0].attentions:
        block.compile(backend="eager")
    with inject(plain.unet, features):
        assert torch.allclose(call_unet(plain.unet), expected, atol=1e-5)
    with pytest.raises(ValueError, match="region by region"), inject(torch.compile(plain.unet), features):
        pass
    with pytest.raises(ValueError, match="Linear has no conv_in"), inject(torch.nn.Linear(1, 1), features):
        pass


# Control images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 65535], [65535, 0]], dtype=np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode != "L" else grey
    hint = control_tensor(image, height=2, width=2)
    assert hint.shape == (1, 3, 2, 2)
    assert torch.allclose(hint[0, :, 0], torch.tensor([0.0, 1.0]).expand(3, 2), atol=0.01)


def test_nearest_invents_no_class_and_lanczos_stays_in_range():
    labels = Image.fromarray(np.random.default_rng(0).choice([0, 100, 255], (5, 7)).astype(np.uint8))
    assert set(control_tensor(labels, height=16, width=12).mul(255).round().unique().tolist()) <= {0, 100, 255}
    smooth = control_tensor(labels, height=16, width=12, interpolation="lanczos")
    assert len(smooth.unique()) > 20 and smooth.min() >= 0 and smooth.max() <= 1


def test_one_image_is_the_same_as_pil_numpy_and_tensor():
    array = np.asarray(IMAGE, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = control_tensor(IMAGE, height=8, width=8, interpolation="lanczos")
    for picture in (array, array[None], tensor, tensor[None], [tensor]):
        assert torch.equal(control_tensor(picture, height=8, width=8, interpolation="lanczos"), wanted)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("map.png", "is a str: a PIL image"),
        ([], "empty list"),
        (np.zeros((4, 4, 3), dtype=np.uint8), r"\(4, 4, 3\) and uint8.*divide bytes by 255"),
        (torch.full((3, 4, 4), 1.5), "from 1.5 to 1.5: 0 to 1 fits"),
        (torch.full((3, 4, 4), torch.nan), "0 to 1 fits"),
        (torch.zeros(2, 4, 4), r"\(2, 4, 4\): 3 channels fit"),
        (np.zeros(4), r"\(4,\): arrays"),
    ],
)
def test_a_control_image_that_cannot_be_used_is_one_sentence(pipe, picture, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, control_image=picture)


# Generating -----------------------------------------------------------------------------------------------------


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

    def watching(unet, features):
        return inject(unet, lambda: ours.append((now := features()) is not None) or now)

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


# Adapters on the pipeline -------------------------------------------------------------------------------------


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


def content(path) -> tuple[dict, dict[str, str]]:
    """Document and digest of a file: what it says, and all that it holds."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["ether"]), metadata["sha256"]


# The file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "encoder alone"])
def test_vectors_and_encoder_are_one_file_that_generates_the_same_image(
    plain, tiny_pipeline_folder, tmp_path, vectors
):
    if vectors:
        adapt(plain, num_blocks=2)
    plain.add_control("default", make_encoder(plain, interpolation="lanczos"))
    wanted = generate(plain, control_image=IMAGE)
    path = plain.save_ether_weights(tmp_path, "default", metadata={"prompt": "a dog"})
    loaded = open_control(tiny_pipeline_folder)
    torch.manual_seed(7)
    loaded.load_ether_weights(tmp_path, "again")
    assert torch.initial_seed() == 7 and torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert same(generate(loaded, control_image=IMAGE), wanted)
    assert loaded.controls["again"].encoder.config.interpolation == "lanczos"
    assert not any(p.requires_grad for p in loaded.controls["again"].encoder.parameters())
    assert content(loaded.save_ether_weights(tmp_path / "b")) == content(path)
    checkpoint = read_adapter_file(path)
    assert set(checkpoint.weights) == {"control_encoder"} and bool(checkpoint.configs) == vectors
    assert (checkpoint.metadata["format_version"], checkpoint.metadata["prompt"]) == (2, "a dog")
    with pytest.raises(ValueError, match="already on"):
        loaded.load_ether_weights(tmp_path, "again")
    assert list(loaded.controls) == ["again"]


def test_the_adapter_that_is_loaded_last_is_the_one_that_controls(pipe, tmp_path):
    pipe.save_ether_weights(tmp_path)
    pipe.load_ether_weights(tmp_path, "second")
    assert pipe.get_active_adapters() == ["second"]
    assert [control.active for control in pipe.controls.values()] == [False, True]


def test_vectors_alone_are_still_written_as_version_1(tiny_pipeline, tmp_path):
    path = adapt(tiny_pipeline).save_ether_weights(tmp_path)
    metadata = read_adapter_file(path).metadata
    assert metadata["format_version"] == 1 and "weights" not in metadata


def test_a_stock_pipeline_says_which_one_applies_an_encoder(pipe, tiny_pipeline, tmp_path):
    pipe.save_ether_weights(tmp_path)
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match="a StableDiffusionPipeline does not apply.*EtherControlPipeline"):
        tiny_pipeline.load_ether_weights(tmp_path)
    assert_unchanged(tiny_pipeline, before)


def test_an_encoder_of_another_architecture_changes_nothing(pipe, wider_pipeline_folder, tmp_path):
    pipe.delete_adapters("default")
    pipe.add_control("default", make_encoder(pipe))
    pipe.save_ether_weights(tmp_path)
    wider = open_control(wider_pipeline_folder)
    with pytest.raises(EtherFileError, match="makes 16 channels, but .* 24; it was made for another architecture"):
        wider.load_ether_weights(tmp_path)
    assert not wider.controls


def test_a_load_that_fails_midway_leaves_the_encoders_as_they_were(pipe, tmp_path, monkeypatch):
    pipe.save_ether_weights(tmp_path)
    before, picture = snapshot(pipe), generate(pipe, control_image=IMAGE)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr("ether_diffusion.adapters.attach.Control", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        pipe.load_ether_weights(tmp_path, "second")
    assert_unchanged(pipe, before)
    assert same(generate(pipe, control_image=IMAGE), picture)


def test_an_encoder_is_swapped_in_place(pipe, tiny_pipeline_folder, tmp_path):
    other = adapt(open_control(tiny_pipeline_folder), num_blocks=2, seed=5)
    other.add_control("default", make_encoder(other, seed=6))
    other.save_ether_weights(tmp_path)
    parameters = list(pipe.controls["default"].encoder.parameters())
    pipe.load_ether_weights(tmp_path, hotswap=True)
    assert all(a is b for a, b in zip(parameters, pipe.controls["default"].encoder.parameters(), strict=True))
    assert same(generate(pipe, control_image=IMAGE), generate(other, control_image=IMAGE))
    other.controls["default"].encoder = make_encoder(other, interpolation="lanczos")
    other.save_ether_weights(tmp_path)
    with pytest.raises(ValueError, match="hotswap: .*lanczos.*load it under another name"):
        pipe.load_ether_weights(tmp_path, hotswap=True)


# Whole modules of a ControlNet --------------------------------------------------------------------------------


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, state) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def nets(tiny_pipeline) -> tuple[StableDiffusionControlNetPipeline, StableDiffusionControlNetPipeline]:
    """A trained ControlNet pipeline, and one with other weights in the modules that are trained as a whole."""
    trained, fresh = zoo.controlnet(tiny_pipeline), zoo.controlnet(tiny_pipeline)
    with torch.no_grad():
        for name, parameter in trained.controlnet.named_parameters():
            if name.startswith(tuple(WHOLE)):
                parameter.add_(0.1)
    return trained, fresh


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "modules alone"])
@pytest.mark.parametrize("undo", ["unload", "delete"])
def test_replaced_modules_are_loaded_in_place_and_put_back(nets, tmp_path, vectors, undo):
    trained, fresh = nets
    if vectors:
        zoo.adapt_components(trained, "controlnet", num_blocks=2, target_modules=["to_q"])
    path = trained.save_ether_weights(tmp_path, "default", replaced_modules={"controlnet": WHOLE})
    before, attributes = state_of(fresh.controlnet), set(fresh.controlnet.__dict__)
    parameters = dict(fresh.controlnet.named_parameters())
    fresh.load_ether_weights(path, "edges")
    after = dict(fresh.controlnet.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items() if name in after)
    assert same(generate(fresh, image=IMAGE), generate(trained, image=IMAGE))
    assert content(fresh.save_ether_weights(tmp_path / "b")) == content(path)
    with pytest.raises(ValueError, match="adapter 'edges', and only one adapter can replace modules"):
        fresh.load_ether_weights(path, "second")
    with pytest.raises(ValueError, match="'edges' is already on"):
        fresh.load_ether_weights(path, "edges")
    fresh.unload_ether_weights() if undo == "unload" else fresh.delete_adapters("edges")
    assert_state(fresh.controlnet, before)
    assert set(fresh.controlnet.__dict__) == attributes


def test_a_pipeline_without_the_component_or_another_architecture_is_refused(nets, tiny_pipeline, tmp_path):
    trained, fresh = nets
    path = trained.save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    with pytest.raises(EtherFileError, match="adapts controlnet, which this StableDiffusionPipeline does not have"):
        tiny_pipeline.load_ether_weights(path)
    fresh.controlnet.controlnet_mid_block = torch.nn.Conv2d(8, 8, 1)
    before = state_of(fresh.controlnet)
    with pytest.raises(EtherFileError, match=r"controlnet_mid_block.* has shape .* the weight here has \(8"):
        fresh.load_ether_weights(path)
    assert_state(fresh.controlnet, before)
    fresh.controlnet.controlnet_mid_block = torch.nn.Conv2d(32, 32, 1, bias=False)
    with pytest.raises(EtherFileError, match="has no controlnet_mid_block.bias"):
        fresh.load_ether_weights(path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"controlnet": ["conv_of_nothing"]}, "conv_of_nothing does not exist in this ControlNetModel"),
        ({"controlnet": ["mid_block.resnets", "mid_block.resnets.0"]}, "resnets.0 is listed twice"),
        ({"controlnet": "mid_block"}, "a list of module paths"),
        ({"controlnet": []}, "a list of module paths"),
        ({"moon": ["mid_block"]}, "moon.* a list of module paths of one of .*controlnet"),
        ({"controlnet": ["down_blocks"]}, "down_blocks carries an adapter here"),
    ],
)
def test_modules_that_cannot_be_held_whole_are_named(nets, tmp_path, modules, message):
    zoo.adapt_components(nets[0], "controlnet", num_blocks=2, target_modules=["to_q"])
    with pytest.raises(ValueError, match=message):
        nets[0].save_ether_weights(tmp_path, replaced_modules=modules)
    assert not (tmp_path / WEIGHTS_NAME).exists()


def test_what_cannot_be_loaded_again_is_not_written(nets, tmp_path):
    with torch.no_grad():
        nets[0].controlnet.controlnet_mid_block.weight[0, 0] = torch.nan
    with pytest.raises(EtherFileError, match="controlnet_mid_block.weight is not made of finite numbers"):
        nets[0].save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_above_a_replaced_module_must_be_unfused_before_that_is_put_back(nets, tmp_path):
    trained, fresh = nets
    before = state_of(fresh.controlnet)
    path = trained.save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    fresh.load_ether_weights(path, "edges")
    zoo.adapt_components(fresh, "controlnet", num_blocks=2, target_modules=["controlnet_mid_block"], name="above")
    fresh.fuse_ether()
    with pytest.raises(ValueError, match="call unfuse_ether first"):
        fresh.delete_adapters("edges")
    fresh.unload_ether_weights()
    assert_state(fresh.controlnet, before)


def test_a_checkpoint_reads_back_as_it_was_written(nets, tmp_path):
    path = nets[0].save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    checkpoint = read_adapter_file(path)
    write_adapter_file(tmp_path / "b.safetensors", checkpoint)
    assert content(tmp_path / "b.safetensors") == content(path)
    assert checkpoint.weights["controlnet"].about == {"modules": WHOLE}
