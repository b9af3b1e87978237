"""Light control of transformers: what is added where, and what the pipelines generate with it."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImageTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
)
from helpers.flow_control import IMAGE, NAMES, OTHER, REQUIRED, conv_encoder, latent_encoder, make_control
from helpers.flow_images import generate
from helpers.flow_zoo import make
from PIL import Image
from torch import nn

from ether_diffusion import EtherConfig, LatentControlEncoder, control_pipeline_class, inject
from ether_diffusion.control.images import control_tensor
from ether_diffusion.control.pipelines import latents_of, over
from ether_diffusion.control.projection import LAYOUTS, first_projection
from ether_diffusion.latents import LatentSpace
from ether_diffusion.training.families import family_of

CLOSE = 2e-5
TWO_CALLS = {"flux": {"negative_prompt": "cat", "true_cfg_scale": 3.0}, "qwen": {"negative_prompt": "cat"}}
"""Where guidance has a call of its own only if it is asked for."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def plain(name, tmp_path):
    return make_control(name, tmp_path)


class Widened(nn.Module):
    """The first projection with more columns, [W | E], of which the new ones see the control image."""

    def __init__(self, layer: nn.Module, columns: torch.Tensor, control: torch.Tensor):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.wide = nn.Conv2d(
                2 * layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, bias=layer.bias is not None
            )
            columns = columns.view_as(layer.weight)
        else:
            self.wide = nn.Linear(2 * layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.wide.weight.data = torch.cat([layer.weight.data, columns], dim=1)
        if layer.bias is not None:
            self.wide.bias.data = layer.bias.data
        self.control, self.axis = control, 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, latents):
        control = self.control.repeat(len(latents) // len(self.control), *[1] * (latents.ndim - 1))
        return self.wide(torch.cat([latents, control], dim=self.axis))


def seen_by_projection(stock, latents):
    """What the transformer's own first projection is given of latents."""
    family, seen = family_of(stock), []
    hook = first_projection(stock.transformer).hooked.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        family.predict(latents, torch.tensor([0.5]), family.conditioning(["a dog"]))
    hook.remove()
    return seen[0].detach()


def test_an_encoder_of_latents_is_the_widened_projection(name, tmp_path):
    """The dense definition: channels concatenated, [W | E] in place of W."""
    stock = make(name, tmp_path)
    pipe = over(control_pipeline_class(type(stock)), stock)
    pipe.set_progress_bar_config(disable=True)
    encoder = latent_encoder(pipe)
    options = TWO_CALLS.get(name, {})
    plain = generate(pipe, **options)
    pipe.add_control("edges", encoder)
    ours = generate(pipe, control_image=IMAGE, **options)
    pipe.unload_ether_weights()
    latents = latents_of(LatentSpace(lambda: stock.vae), control_tensor(IMAGE, height=32, width=32))
    projection = first_projection(stock.transformer)
    wide = Widened(projection.layer, encoder.projection.weight.data, seen_by_projection(stock, latents))
    parent, _, child = projection.layout.path.rpartition(".")
    stock.transformer.get_submodule(parent)._modules[child] = wide
    dense = generate(stock, **options)
    assert np.abs(ours - dense).max() < CLOSE and np.abs(ours - plain).max() > 100 * CLOSE


@pytest.mark.parametrize("make_encoder", [latent_encoder, conv_encoder], ids=["latent", "conv"])
def test_an_untrained_encoder_and_strength_0_are_the_base_bit_for_bit(name, plain, tmp_path, make_encoder):
    stock = generate(over(plain._stock, plain))
    assert np.array_equal(generate(plain), stock)
    encoder = make_encoder(plain, seed=None)
    plain.add_control("edges", encoder)
    assert np.array_equal(generate(plain, control_image=IMAGE), stock)
    plain.delete_adapters("edges")
    plain.add_control("edges", make_encoder(plain))
    assert np.array_equal(generate(plain), stock)
    assert np.array_equal(generate(plain, control_image=IMAGE, controlnet_conditioning_scale=0.0), stock)
    plain.set_adapters("edges", 0.0)
    assert np.array_equal(generate(plain, control_image=IMAGE), stock)
    plain.set_adapters("edges")
    assert np.abs(generate(plain, control_image=IMAGE) - stock).max() > 100 * CLOSE
    plain.unload_ether_weights()
    assert np.array_equal(generate(plain), stock) and not first_projection(plain.transformer).hooked._forward_hooks
    assert not plain.controls and not any("ether" in name for name in plain.transformer.__dict__)


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "encoder alone"])
def test_one_file_generates_the_same_image(name, plain, tmp_path, vectors):
    if vectors:
        config = EtherConfig(method="ether_plus", init_weights=False, target_modules=["to_q"])
        plain.transformer.add_adapter(config, "edges")
    plain.add_control("edges", latent_encoder(plain, value_range=(0.0, 4095.0), interpolation="lanczos"))
    wanted = generate(plain, control_image=IMAGE)
    plain.save_ether_weights(tmp_path, "edges")
    loaded = make_control(name, tmp_path)
    stock = generate(loaded)
    loaded.load_ether_weights(tmp_path)
    assert np.array_equal(generate(loaded, control_image=IMAGE), wanted)
    config = loaded.controls["default_0"].encoder.config
    assert (config.interpolation, list(config.value_range)) == ("lanczos", [0, 4095])
    loaded.disable_ether()
    assert np.array_equal(generate(loaded, control_image=IMAGE), stock)
    loaded.enable_ether()
    loaded.unload_ether_weights()
    assert np.array_equal(generate(loaded), stock)


@pytest.mark.parametrize("name", ["flux", "klein", "sd3", "sana"], indirect=True)
@pytest.mark.parametrize(("start", "end", "acting"), [(0.0, 0.5, [1, 1, 0, 0]), (0.25, 1.0, [0, 1, 1, 1])])
def test_the_part_of_the_steps_is_counted_in_steps_not_in_calls(name, plain, monkeypatch, start, end, acting):
    plain.add_control("edges", latent_encoder(plain))
    seen = []

    def watching(denoiser, features, **options):
        return inject(denoiser, lambda: seen.append((now := features()) is not None) or now, **options)

    monkeypatch.setattr("ether_diffusion.control.pipelines.inject", watching)
    window = {"control_guidance_start": start, "control_guidance_end": end}
    generate(plain, control_image=IMAGE, num_inference_steps=4, **window, **TWO_CALLS.get(name, {}))
    calls = 2 if name in ("flux", "klein") else 1  # of the transformer in a step
    assert seen == [bool(acts) for acts in acting for _ in range(calls)]


@pytest.mark.parametrize("name", REQUIRED + ("z_image", "lumina2"), indirect=True)
def test_prompts_and_copies_each_follow_their_own_image(name, plain):
    plain.add_control("edges", latent_encoder(plain))
    prompts, images = ["a dog", "a cat"], [IMAGE, OTHER]
    noise = [torch.Generator().manual_seed(k) for k in range(4)]
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    together = plain(list(prompts), control_image=images, num_images_per_prompt=2, generator=noise, **options).images
    for k in range(4):
        own, image = torch.Generator().manual_seed(k), images[k // 2]
        alone = plain(prompts[k // 2], control_image=image, generator=own, **options).images[0]
        assert np.abs(together[k] - alone).max() < 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux"], indirect=True)
def test_encoders_of_both_kinds_add_up_each_by_its_weight(plain):
    plain.add_control("edges", latent_encoder(plain))
    plain.add_control("map", conv_encoder(plain, seed=4))
    pictures = {"edges": IMAGE, "map": OTHER}
    both = generate(plain, control_image=pictures, controlnet_conditioning_scale={"edges": 0.5, "map": 0.25})
    plain.set_adapters(["edges", "map"], [0.5, {"control_encoder": 0.25}])
    assert np.abs(generate(plain, control_image=pictures) - both).max() < CLOSE
    plain.set_adapters("edges", 0.5)
    assert np.abs(generate(plain, control_image=IMAGE) - both).max() > 100 * CLOSE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux", FluxImg2ImgPipeline),
        ("sd3", StableDiffusion3Img2ImgPipeline),
        ("qwen", QwenImageImg2ImgPipeline),
    ],
    indirect=["name"],
)
def test_image_to_image_is_the_stock_one_and_control_changes_it(plain, kind):
    options = {"image": OTHER, "strength": 0.6, "num_inference_steps": 3, "height": 32, "width": 32}

    def of(pipe, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt="a dog", generator=generator, output_type="np", **options, **more).images[0]

    stock = of(over(kind, plain))
    plain.add_control("edges", latent_encoder(plain))
    assert np.array_equal(of(plain), stock)
    assert np.abs(of(plain, control_image=IMAGE) - stock).max() > 100 * CLOSE
    late = of(plain, control_image=IMAGE, control_guidance_start=0.5)
    assert np.abs(late - stock).max() > 100 * CLOSE and not np.array_equal(late, of(plain, control_image=IMAGE))


@pytest.mark.parametrize("name", ["klein", "flux2"], indirect=True)
def test_reference_images_stay_beside_the_control_image(name, plain):
    reference = Image.new("RGB", (64, 64), "red")
    stock = generate(over(plain._stock, plain), image=reference)
    encoder = latent_encoder(plain)
    plain.add_control("edges", encoder)
    assert np.array_equal(generate(plain, image=reference), stock)
    added, before = [], first_projection(plain.transformer).layer
    watch = plain.transformer.register_forward_pre_hook(
        lambda m, a, k: added.append(k["hidden_states"]), with_kwargs=True
    )
    controlled = generate(plain, image=reference, control_image=IMAGE)
    watch.remove()
    assert np.abs(controlled - stock).max() > 100 * CLOSE
    tokens, features = added[0], torch.ones(1, encoder.config.out_channels, 8, 8)
    assert tokens.shape[1] > 64
    with inject(plain.transformer, features, references=True):
        changed = first_projection(plain.transformer).hooked(tokens)
    assert torch.equal(changed[:, 64:], before(tokens)[:, 64:])
    assert torch.allclose(changed[:, :64], before(tokens)[:, :64] + 1)
    with inject(plain.transformer, features), pytest.raises(ValueError, match="do not fit the denoiser's first"):
        first_projection(plain.transformer).hooked(tokens)


@pytest.mark.parametrize("name", ["flux", "sd3", "klein"], indirect=True)
def test_latents_to_start_from_may_be_given(name, plain):
    plain.add_control("edges", latent_encoder(plain))
    shapes = {"flux": (1, 64, 16), "sd3": (1, 4, 16, 16), "klein": (1, 16, 8, 8)}
    noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(0))
    given = generate(plain, control_image=IMAGE, latents=noise)
    assert np.abs(given - generate(plain, latents=noise)).max() > 100 * CLOSE
    if name == "sd3":
        assert plain("a dog", control_image=IMAGE, latents=noise, num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize("name", ["flux"], indirect=True)
def test_an_offloaded_pipeline_and_one_in_half_precision_are_controlled(plain):
    plain.add_control("edges", latent_encoder(plain))
    wanted = generate(plain, control_image=IMAGE)
    plain.enable_model_cpu_offload(device="cpu")
    assert np.abs(generate(plain, control_image=IMAGE) - wanted).max() < CLOSE
    plain.remove_all_hooks()
    plain.to(torch.bfloat16)
    assert plain.controls["edges"].encoder.dtype == torch.bfloat16
    assert np.abs(generate(plain, control_image=IMAGE) - wanted).max() < 0.3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux", {"height": 30}, "height=30, width=32: multiples of 4 fit"),
        ("sana", {"use_resolution_binning": True}, "use_resolution_binning: .* pass False"),
        ("sana", {"image": IMAGE}, "there is no image-to-image pipeline for a SanaPipeline"),
        ("klein", {"strength": 0.5}, "no effect without image; this pipeline takes reference images"),
        ("qwen", {"control_imgae": IMAGE}, "control_imgae: text-to-image takes no such argument"),
    ],
    indirect=["name"],
)
def test_an_argument_that_cannot_be_used_is_one_sentence(plain, options, message):
    plain.add_control("edges", latent_encoder(plain))
    given = {"height": 32, "width": 32, "control_image": IMAGE, **options}
    with pytest.raises(ValueError, match=message):
        plain("a dog", **given)


@pytest.mark.parametrize("name", ["flux"], indirect=True)
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (LatentControlEncoder(8, 4), "makes 8 channels, but the denoiser's first projection here 32"),
        (LatentControlEncoder(32, 8), "takes latents of 8 channels in patches of 2, .* here they have 4 channels"),
        (
            LatentControlEncoder(32, 4, channels_last=True),
            "last: True; here they have .* last: False",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(plain, encoder, message):
    with pytest.raises(ValueError, match=message):
        plain.add_control("edges", encoder)
    assert not plain.controls


def test_a_unet_takes_no_encoder_of_latents(tiny_pipeline):
    pipe = over(control_pipeline_class(type(tiny_pipeline)), tiny_pipeline)
    with pytest.raises(ValueError, match="takes latents, but the denoiser here is a UNet"):
        pipe.add_control("edges", LatentControlEncoder(16, 4))
    with pytest.raises(ValueError, match="UNet2DConditionModel: latents of control images are for transformers"):
        LatentControlEncoder.for_denoiser(pipe.unet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "whole numbers from 1 fit"),
        ({"in_channels": 4, "interpolation": "cubic"}, "'cubic'.* nearest, lanczos"),
    ],
)
def test_an_encoder_that_cannot_be_built_says_what_fits(options, message):
    with pytest.raises(ValueError, match=message):
        LatentControlEncoder(8, **options)
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 2\).*multiples of 2"):
        LatentControlEncoder(8, 4)(torch.rand(1, 4, 3, 2))


def test_an_unknown_model_or_pipeline_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"Linear has no conv_in.*UNets \(conv_in\), FluxTransformer2DModel, "):
        first_projection(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="PixArtAlphaPipeline: there is light control for StableDiffusionPipeline, "):
        control_pipeline_class("PixArtAlphaPipeline")
    assert all(kind.__name__.endswith("Transformer2DModel") for kind in LAYOUTS)


@pytest.mark.parametrize("name", ["flux"], indirect=True)
def test_a_file_of_another_architecture_is_refused_and_a_stock_pipeline_names_the_class(plain, tmp_path):
    plain.add_control("edges", latent_encoder(plain))
    plain.save_ether_weights(tmp_path, "edges")
    with pytest.raises(ValueError, match="the encoder takes latents of|the encoder makes"):
        make_control("klein", tmp_path).load_ether_weights(tmp_path)
    with pytest.raises(ValueError, match="load it onto an EtherControlFluxPipeline"):
        over(plain._stock, plain).load_ether_weights(tmp_path, "again")


@pytest.mark.parametrize(
    ("kind", "count"),
    [(FluxTransformer2DModel, 196_608), (Flux2Transformer2DModel, 786_432), (QwenImageTransformer2DModel, 196_608)],
)
def test_an_encoder_of_latents_has_as_many_parameters_as_the_new_columns(kind, count):
    with torch.device("meta"):
        model = kind(num_layers=1, **({} if kind is QwenImageTransformer2DModel else {"num_single_layers": 1}))
        assert LatentControlEncoder.for_denoiser(model).num_parameters() == count


@pytest.mark.parametrize("name", ["flux", "klein", "sd3", "qwen"], indirect=True)
def test_a_stock_pipeline_becomes_one_with_control_and_back(name, plain):
    stock = over(plain._stock, plain)
    wanted = generate(stock)
    opened = type(plain).from_pipe(stock)
    opened.set_progress_bar_config(disable=True)
    assert opened.transformer is stock.transformer and np.array_equal(generate(opened), wanted)
    opened.add_control("edges", latent_encoder(opened))
    assert np.array_equal(generate(plain, control_image=IMAGE), generate(opened, control_image=IMAGE))
    assert type(opened).__name__ == f"EtherControl{type(stock).__name__}"
    assert json.loads(opened.to_json_string())["_class_name"] == type(stock).__name__


@pytest.mark.parametrize("name", ["flux"], indirect=True)
def test_a_file_is_exchanged_in_place_for_one_of_the_same_kind(plain, tmp_path):
    plain.add_control("edges", latent_encoder(plain))
    plain.save_ether_weights(tmp_path / "latent", "edges")
    wanted = generate(plain, control_image=IMAGE)
    plain.delete_adapters("edges")
    plain.add_control("edges", latent_encoder(plain, seed=4))
    plain.load_ether_weights(tmp_path / "latent", "edges", hotswap=True)
    assert np.array_equal(generate(plain, control_image=IMAGE), wanted)
    plain.delete_adapters("edges")
    plain.add_control("edges", conv_encoder(plain))
    with pytest.raises(ValueError, match="load it under another name"):
        plain.load_ether_weights(tmp_path / "latent", "edges", hotswap=True)
