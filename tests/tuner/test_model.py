"""Diffusers' own adapter methods on a UNet and on transformers (DiT, SD3, FLUX) of small size."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models import Flux2Transformer2DModel
from peft import get_peft_model

from ether_diffusion import EtherConfig, EtherLayer


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
    ), {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 16)}


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
    ), {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 16),
    }


def flux_inputs(width: int, axes: int) -> dict:
    return {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 5, width),
        "timestep": torch.tensor([0.3]),
        "img_ids": torch.zeros(16, axes),
        "txt_ids": torch.zeros(5, axes),
    }


def flux():
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    ), {**flux_inputs(16, 3), "pooled_projections": torch.randn(1, 16)}


def flux2():
    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ), flux_inputs(16, 4)


MODELS = {"unet": unet, "sd3": sd3, "flux": flux, "flux2": flux2}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_diffusers_adapter_methods_work(name, method):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.eval()
    inference = torch.no_grad()
    with inference:
        base = model(**inputs, return_dict=False)[0]
        model.add_adapter(EtherConfig(method=method, init_weights=False), adapter_name="dog")
        assert any(isinstance(m, EtherLayer) for m in model.modules())
        dog = model(**inputs, return_dict=False)[0]
        assert not torch.allclose(dog, base, atol=1e-6)
        model.add_adapter(EtherConfig(method=method, init_weights=False), adapter_name="cat")
        assert model.active_adapters() == ["cat"]
        model.set_adapters(["dog", "cat"], [1.0, 0.0])
        assert torch.equal(model(**inputs, return_dict=False)[0], dog)
        model.disable_adapters()
        assert torch.equal(model(**inputs, return_dict=False)[0], base)
        model.enable_adapters()
        model.delete_adapters("cat")
        model.set_adapter("dog")
        assert torch.equal(model(**inputs, return_dict=False)[0], dog)


@pytest.mark.parametrize(
    ("name", "single"),
    [("flux", {"attn.to_q", "attn.to_k", "attn.to_v"}), ("flux2", {"attn.to_qkv_mlp_proj", "attn.to_out"})],
)
def test_single_stream_blocks_are_adapted_too(name, single):
    model, _ = MODELS[name]()
    model.add_adapter(EtherConfig())
    names = {n for n, m in model.named_modules() if isinstance(m, EtherLayer)}
    double = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}
    assert names == {f"transformer_blocks.0.{n}" for n in double} | {
        f"single_transformer_blocks.0.{n}" for n in single
    }


def test_convolutions_of_a_unet_are_adapted_and_fused():
    torch.manual_seed(0)
    model, inputs = unet()
    model = model.eval()
    targets = ["conv1", "conv2", "conv_shortcut", "conv_in"]
    with torch.no_grad():
        base = model(**inputs).sample
        model.add_adapter(EtherConfig(method="ether_plus", num_blocks=2, target_modules=targets, init_weights=False))
        adapted = model(**inputs).sample
        assert not torch.allclose(adapted, base, atol=1e-4)
        model.fuse_lora(safe_fusing=True)
        torch.testing.assert_close(model(**inputs).sample, adapted, rtol=1e-4, atol=1e-4)
        model.unfuse_lora()
        model.disable_adapters()
        assert torch.equal(model(**inputs).sample, base)


def test_training_with_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model, inputs = unet()
    model.requires_grad_(False)
    model.add_adapter(EtherConfig(method="ether_plus"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0] and all(torch.allclose(g, gradients[1][n], atol=1e-6) for n, g in gradients[0].items())


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@torch.no_grad()
def test_a_model_that_is_offloaded_after_adapters_were_added_answers_the_same(method):
    torch.manual_seed(0)
    model, inputs = unet()
    model = model.eval()
    config = EtherConfig(method=method, init_weights=False)
    for name in ("cat", "dog"):
        model.add_adapter(config, adapter_name=name)
    dog = model(**inputs).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    torch.testing.assert_close(model(**inputs).sample, dog)  # by another form of the same function
    model.add_adapter(config, adapter_name="fox")
    fox = model(**inputs).sample
    assert not torch.allclose(fox, dog, atol=1e-6)
    model.delete_adapters("cat")
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(**inputs).sample, fox)
    model.set_adapter("dog")
    torch.testing.assert_close(model(**inputs).sample, dog)


@torch.no_grad()
def test_an_offloaded_model_merges():
    torch.manual_seed(0)
    base, inputs = unet()
    model = get_peft_model(base.eval(), EtherConfig(method="ether_plus", init_weights=False))
    answer = model(**inputs).sample
    cpu_offload(base, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model.merge_and_unload()(**inputs).sample, answer, rtol=1e-4, atol=1e-5)
