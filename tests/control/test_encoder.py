"""The control encoder, and what it adds to a UNet."""

import pytest
import torch
from helpers.control import call_unet, make_encoder

from ether_diffusion import (
    ControlEncoder,
    EtherConfig,
    inject,
)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_an_encoder_reduces_a_image_as_the_autoencoder_does(plain, factor):
    encoder = ControlEncoder.for_denoiser(plain.unet, factor=factor)
    assert encoder.factor == factor
    assert encoder(torch.rand(2, 3, 32, 48)).shape == (2, 16, 32 // factor, 48 // factor)
    assert encoder.config.block_out_channels[:4] == (16, 32, 96, 256)[: len(encoder.config.block_out_channels)]


@pytest.mark.parametrize(
    ("channels", "factor", "count"),
    [(320, 8, 1_086_480), (80, 4, 113_600)],  # Stable Diffusion of every size, and the miniature
)
def test_an_encoder_has_the_published_number_of_parameters(channels, factor, count):
    encoder = ControlEncoder.for_denoiser(torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, channels, 3)}), factor)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count


def test_an_encoder_for_an_adapted_unet_reads_through_the_adapter(plain):
    plain.unet.add_adapter(EtherConfig(target_modules=["conv_in"], num_blocks=2))
    assert ControlEncoder.for_denoiser(plain.unet, 2).config.out_channels == 16


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
        ControlEncoder.for_denoiser(None, factor=6)
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 8\).*multiples of 2"):
        ControlEncoder(4, block_out_channels=(4, 4))(torch.rand(1, 3, 5, 8))


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
