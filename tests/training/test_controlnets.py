"""ControlNets of transformers: what they are made of, and that training asks of them what the stock pipelines do."""

import re

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel, SD3ControlNetModel, SD3Transformer2DModel
from helpers.controlnets import NAMES, controlnets_of, drawn, make_deep
from PIL import Image
from torch import Tensor

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.schema import MAX_WEIGHTS
from ether_diffusion.control.controlnets import FluxControlNets, SD3ControlNets, with_controlnet
from ether_diffusion.errors import InputError
from ether_diffusion.images import to_pixels
from ether_diffusion.tokens import from_tokens, join_patches
from ether_diffusion.training.families import family_of
from ether_diffusion.training.families.flux import DOUBLE_ATTENTION
from ether_diffusion.training.methods.injection import dry_run

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
CONTROL = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 32, 3), dtype=np.uint8))
SIZE = {"height": 16, "width": 32}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return {name: make_deep(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def family(pipes, name):
    return family_of(pipes[name])


def stated(model) -> dict[str, object]:
    """A model's config as a file holds it."""
    return {key: value for key, value in model.config.items() if key != "_use_default_values"}


def as_latents(values: Tensor) -> Tensor:
    """What a pipeline keeps as tokens, as latents."""
    if values.ndim == 4:
        return values
    return join_patches(from_tokens(values, torch.empty(1, 1, 16 // 4, 32 // 4)))


def steps_of(pipe, **inputs) -> list[tuple[Tensor, float, Tensor]]:
    """The velocity, level and noisy latents that each step of the scheduler receives."""
    taken, step = [], pipe.scheduler.step

    def record(velocity, time, noisy, **options):
        taken.append((velocity.clone(), float(time) / 1000, noisy.clone()))
        return step(velocity, time, noisy, **options)

    pipe.scheduler.step = record
    try:
        usual = {"num_inference_steps": 3, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
        pipe(output_type="latent", **usual, **SIZE, **inputs)
    finally:
        pipe.scheduler.step = step
    return taken


CASES = [
    ("flux", {"num_double_layers": 1, "num_single_layers": 2}, {}),
    ("flux", {"num_double_layers": 3, "num_single_layers": 0}, {}),
    ("flux", {"num_double_layers": 0, "num_single_layers": 3}, {"guidance_embeds": False}),
    ("sd3", {"num_double_layers": 1}, {}),
    ("sd3", {"num_double_layers": 2}, {"force_zeros_for_pooled_projection": False}),
    # Not made by any flag, but published: blocks without text, whose positions are those of the transformer.
    ("sd3", {"num_double_layers": 2}, {"joint_attention_dim": None, "use_pos_embed": False}),
]


@pytest.mark.parametrize(("name", "layers", "more"), CASES)
def test_predicts_with_a_controlnet_what_the_stock_pipeline_gives_to_its_scheduler(name, family, layers, more):
    made = controlnets_of(family.pipe, **layers).copy_of(family.pipe.transformer)
    torch.manual_seed(1)
    controlnet = drawn(type(made).from_config({**stated(made), **more}))
    stock = with_controlnet(family.pipe, controlnet)
    conditioning = family.conditioning(["a red dog"])
    with torch.no_grad():
        control = family.latents.draw(family.latents.encode(to_pixels(CONTROL)), None)[None]
        for velocity, level, noisy in steps_of(stock, prompt="a red dog", control_image=CONTROL):
            given = (as_latents(noisy), torch.tensor([level]), conditioning)
            answer = family.predict(*given, **family.residuals(controlnet, *given, control))
            torch.testing.assert_close(answer, as_latents(velocity), **CLOSE)
            assert (family.predict(*given) - answer).abs().max() > 1e-3


def test_a_copy_changes_nothing_of_the_image_nor_of_what_it_was_made_from(family):
    transformer = family.pipe.transformer
    before = dict(transformer.config)
    controlnet = controlnets_of(family.pipe).copy_of(transformer)
    assert dict(transformer.config) == before
    theirs, own = transformer.state_dict(), controlnet.state_dict()
    copied = [key for key in own if key in theirs and not key.startswith("controlnet")]
    assert len(copied) > 20 and all(torch.equal(own[key], theirs[key]) for key in copied)
    stock = with_controlnet(family.pipe, controlnet)
    inputs = {"output_type": "np", "num_inference_steps": 2, **SIZE}
    with_control, without = (
        family.generate(["a dog"], pipe=pipe, generator=torch.Generator().manual_seed(0), **inputs, **more).images
        for pipe, more in ((stock, {"control_image": CONTROL}), (family.pipe, {}))
    )
    assert np.array_equal(with_control, without)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flux", {"num_layers": 1, "num_single_layers": 2}),
        ("flux", {"num_layers": 2, "num_single_layers": 0}),
        ("flux", {"num_layers": 0, "num_single_layers": 5}),
        ("flux", {"num_layers": 3, "num_single_layers": 4}),
        ("flux", {"num_layers": 4, "num_single_layers": 0}),
        ("sd3", {"num_layers": 1}),
        ("sd3", {"num_layers": 2}),
        ("sd3", {"num_layers": 4}),
        ("sd3", {"num_layers": 6}),
        ("sd3", {"num_layers": 3, "joint_attention_dim": None, "use_pos_embed": False}),
    ],
)
def test_the_unused_parts_are_those_that_get_no_gradient(name, family, layers):
    nets = controlnets_of(family.pipe)
    made = nets.copy_of(family.pipe.transformer, load_weights=False)
    controlnet = drawn(type(made).from_config({**stated(made), **layers})).requires_grad_(True)
    with_controlnet(family.pipe, controlnet)  # which gives it positions, where it has none
    if not controlnet.config.get("use_pos_embed", True):
        controlnet.pos_embed.requires_grad_(False)
    family.pipe.transformer.requires_grad_(False)
    for module in nets.unused(controlnet):
        module.requires_grad_(False)
    noisy, control = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = (noisy, torch.tensor([0.5]), family.conditioning(["a red dog"]))
    controlnet.zero_grad(set_to_none=True)
    family.predict(*given, **family.residuals(controlnet, *given, control)).square().sum().backward()
    reached = {key for key, each in controlnet.named_parameters() if each.grad is not None}
    assert reached == {key for key, each in controlnet.named_parameters() if each.requires_grad}


LARGE = {"pos_embed_max_size": 192, "qk_norm": "rms_norm"}
FULL_SIZE = [
    (
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        (FluxControlNets, {"num_double_layers": 4, "num_single_layers": 4}, 2_046_461_952, 75_721_728),
        (135_168, 540_672),
    ),
    (
        SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
        | {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        (SD3ControlNets, {"num_double_layers": 12}, 1_261_169_664, 28_429_824),
        (221_184, 884_736),
    ),
    (
        SD3Transformer2DModel,
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, **LARGE},
        (SD3ControlNets, {"num_double_layers": 12}, 2_654_723_200, 71_162_752),
        (233_472, 933_888),
    ),
]


@pytest.mark.parametrize(("kind", "config", "made", "vectors"), FULL_SIZE, ids=["flux", "sd3.5-medium", "sd3.5-large"])
def test_by_default_as_many_layers_are_copied_as_the_scripts_of_diffusers_copy(kind, config, made, vectors):
    nets_class, layers, copied, whole = made
    with torch.device("meta"):
        nets = nets_class(kind(**config), 16)
        controlnets = [nets.copy_of(nets.denoiser, load_weights=False) for _ in vectors]
    assert nets.layers == layers
    for controlnet, method, count in zip(controlnets, ("ether", "ether_plus"), vectors, strict=True):
        assert sum(each.numel() for each in controlnet.parameters()) == copied
        own = [each for name in nets.own_names(controlnet) for each in getattr(controlnet, name).parameters()]
        assert sum(each.numel() for each in own) == whole <= MAX_WEIGHTS
        adapters = {"controlnet": EtherConfig(method=method, target_modules=list(DOUBLE_ATTENTION))}
        assert dry_run({"controlnet": controlnet}, adapters) == count


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        (
            "flux",
            {"num_double_layers": 4},
            "--num_double_layers: got 4; of the transformer's 3 blocks, 0, 1, 2, 3",
        ),
        ("flux", {"num_single_layers": 4}, "--num_single_layers: got 4; of the transformer's 5 blocks, 0, 1, 2, 3, 5"),
        ("flux", {"num_double_layers": 0, "num_single_layers": 0}, "got 0; a FluxControlNetModel needs a block"),
        ("sd3", {"num_double_layers": 3}, "--num_double_layers: got 3; of the transformer's 5 blocks, 0, 1, 2 fit"),
        ("sd3", {"num_single_layers": 1}, "--num_single_layers: has no effect on a SD3ControlNetModel"),
    ],
)
def test_layers_that_a_transformer_would_not_use_are_refused(name, family, layers, message):
    with pytest.raises(InputError, match=re.escape(message)):
        controlnets_of(family.pipe, **layers)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("flux", {"in_channels": 8}, "has in_channels 8, needs that of the transformer, 16"),
        ("flux", {"axes_dims_rope": (8, 4, 4)}, r"has axes_dims_rope \[8, 4, 4\], needs that of the transformer"),
        ("flux", {"num_mode": 3}, "is a union of several kinds of control"),
        ("flux", {"conditioning_embedding_channels": 16}, "has a stem that reads the image itself"),
        ("sd3", {"extra_conditioning_channels": 1}, "reads 1 channels besides the control image"),
        ("sd3", {"joint_attention_dim": 48}, "has joint_attention_dim 48, needs that of the transformer, 32"),
        ("sd3", {"pos_embed_max_size": 4}, "takes sides of up to 16 pixels, and --resolution is 32"),
        ("sd3", {"num_attention_heads": 2}, "has num_attention_heads 2, needs that of the transformer, 4"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused_by_its_config(name, family, more, message):
    nets, kind = controlnets_of(family.pipe), {"flux": FluxControlNetModel, "sd3": SD3ControlNetModel}[name]
    fits = nets.copy_of(family.pipe.transformer, load_weights=False)
    nets.check(fits, "--given", 32)
    with torch.device("meta"):
        other = kind.from_config({**stated(fits), **more})
    with pytest.raises(InputError, match=f"--given: {message}"):
        nets.check(other, "--given", 32)
