"""ETHER beside LoRA on one layer, and under the calls that diffusers has for LoRA."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.peft_utils import get_adapter_name, recurse_remove_peft_layers
from helpers.oracle import dense
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion import EtherConfig, EtherLayer

ETHER = EtherConfig(method="ether_plus", target_modules=["linear"], init_weights=False)
LORA = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(x)


def stacked(*, ether_first: bool):
    """A model with both methods on one layer, with the ETHER and the LoRA layer, and ETHER's dense matrices."""
    torch.manual_seed(0)
    model = OneLayer().double()
    for config in (ETHER, LORA) if ether_first else (LORA, ETHER):
        inject_adapter_in_model(copy.deepcopy(config), model)
    outer, inner = model.linear, model.linear.base_layer
    ether, lora = (inner, outer) if ether_first else (outer, inner)
    vectors = ether.vectors("default")
    return model, ether, lora, *(dense(*side) for side in vectors.sides())


@pytest.fixture
def x():
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_ether_over_lora_reflects_what_lora_made(x):
    model, ether, lora, right, left = stacked(ether_first=False)
    weight = lora.get_base_layer().weight + lora.get_delta_weight("default")
    torch.testing.assert_close(model(x), x @ (left @ weight @ right).T + ether.bias)


def test_lora_over_ether_adds_to_what_ether_made(x):
    model, ether, lora, right, left = stacked(ether_first=True)
    weight = left @ ether.weight @ right + lora.get_delta_weight("default")
    torch.testing.assert_close(model(x), x @ weight.T + ether.bias)


def test_ether_and_the_lora_below_merge_and_unmerge_from_below(x):
    model, ether, lora, *_ = stacked(ether_first=False)
    both, pristine = model(x), ether.weight.clone()
    with pytest.raises(ValueError, match="unmerged adapters lies below this ETHER layer"):
        ether.merge()
    lora.merge()
    ether.merge()
    torch.testing.assert_close(model(x), both)
    ether.unmerge()
    torch.testing.assert_close(model(x), both)
    lora.unmerge()
    torch.testing.assert_close(ether.weight, pristine)


@pytest.mark.parametrize("ether_unmerges_first", [True, False])
def test_a_lora_merged_over_merged_ether_survives_unmerging_in_any_order(ether_unmerges_first, x):
    model, ether, lora, *_ = stacked(ether_first=True)
    both, pristine = model(x), ether.weight.clone()
    ether.merge()
    torch.testing.assert_close(model(x), both)
    lora.merge()
    torch.testing.assert_close(model(x), both)
    ether.enable_adapters(False)
    torch.testing.assert_close(model(x), x @ (pristine + lora.get_delta_weight("default")).T + ether.bias)
    ether.enable_adapters(True)
    for layer in (ether, lora) if ether_unmerges_first else (lora, ether):
        layer.unmerge()
    torch.testing.assert_close(ether.weight, pristine)
    torch.testing.assert_close(model(x), both)


def test_a_second_ether_adapter_merges_beside_a_lora_merged_in_between(x):
    model, ether, lora, *_ = stacked(ether_first=True)
    ether.update_layer("second", copy.deepcopy(ETHER))
    for layer in (ether, lora):
        layer.set_adapter(["default", "second"])
    both, pristine = model(x), ether.weight.clone()
    ether.merge(adapter_names=["default"])
    lora.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        ether.merge(adapter_names=["second"])
    torch.testing.assert_close(model(x), both)
    ether.unmerge()
    lora.unmerge()
    torch.testing.assert_close(ether.weight, pristine)


def test_merging_both_and_unloading_leaves_a_plain_layer(x):
    model, ether, lora, *_ = stacked(ether_first=True)
    both = model(x)
    for layer in (ether, lora):
        layer.merge()
    recurse_remove_peft_layers(model)
    assert type(model.linear) is nn.Linear
    torch.testing.assert_close(model(x), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_cast_while_merged_unmerges_to_the_cast_base(dtype):
    model = get_peft_model(OneLayer(), copy.deepcopy(ETHER))
    layer = model.base_model.model.linear
    pristine = layer.weight.clone()
    model.merge_adapter()
    model.to(dtype)
    with model.disable_adapter():
        model(torch.randn(2, 8, dtype=dtype))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, pristine.to(dtype))


def test_vectors_that_change_while_merged_do_not_hinder_unmerging():
    model = get_peft_model(OneLayer(), copy.deepcopy(ETHER))
    layer = model.base_model.model.linear
    pristine = layer.weight.clone()
    model.merge_adapter()
    with torch.no_grad():
        layer.ether_u["default"].normal_()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, pristine)


def test_a_broken_adapter_that_was_merged_unmerges_to_the_base():
    model = get_peft_model(OneLayer(), copy.deepcopy(ETHER))
    layer = model.base_model.model.linear
    pristine = layer.weight.clone()
    with torch.no_grad():
        layer.ether_u["default"].fill_(float("nan"))
    model.merge_adapter()
    assert torch.isnan(layer.weight).all()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, pristine)


def test_a_layer_whose_forward_is_never_called_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match="attention.out_proj: torch.nn.MultiheadAttention reads the weight past ETHER"):
        get_peft_model(model, EtherConfig(target_modules=["out_proj"]))


def small_unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
    ).eval()
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 16)}
    return model, lambda **options: model(**inputs, **options, return_dict=False)[0].detach()


def small_text_encoder():
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


def test_stock_fusing_of_ether_and_lora_together_keeps_the_output_and_comes_undone():
    unet, answer = small_unet()
    unet.add_adapter(EtherConfig(init_weights=False), "reflection")
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], r=2, init_lora_weights=False), "lora")
    unet.set_adapters(["reflection", "lora"], [0.8, 0.5])
    both, weights = answer(), {name: p.clone() for name, p in unet.named_parameters()}
    unet.fuse_lora()
    torch.testing.assert_close(answer(), both, rtol=1e-4, atol=1e-5)
    unet.unfuse_lora()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-5, atol=1e-6)


def test_a_scale_per_call_is_the_strength_of_that_call():
    unet, answer = small_unet()
    base = answer()
    unet.add_adapter(EtherConfig(init_weights=False), "reflection")
    unet.set_adapters("reflection", 0.4)
    weaker = answer()
    unet.set_adapters("reflection", 0.8)
    full = answer()
    torch.testing.assert_close(answer(cross_attention_kwargs={"scale": 0.5}), weaker)
    torch.testing.assert_close(answer(), full)
    assert torch.equal(answer(cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(answer(), full)


def test_a_lora_gets_a_name_of_its_own_beside_ether():
    unet, _ = small_unet()
    unet.add_adapter(EtherConfig(), get_adapter_name(unet))
    assert get_adapter_name(unet) not in unet.peft_config


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_layerwise_casting_stores_the_base_small_and_leaves_the_vectors(method):
    unet, answer = small_unet()
    unet.add_adapter(EtherConfig(method=method, init_weights=False))
    full = answer()
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    layers = [m for m in unet.modules() if isinstance(m, EtherLayer)]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert {v.dtype for layer in layers for v in layer.vectors("default").named().values()} == {torch.float32}
    torch.testing.assert_close(answer(), full, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("build", [lambda: small_unet()[0], small_text_encoder])
def test_removing_every_peft_layer_brings_the_classes_of_the_base_back(build):
    model, base = build(), build()
    model.add_adapter(EtherConfig(method="ether_plus"))
    recurse_remove_peft_layers(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
