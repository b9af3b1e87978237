"""Parameter counts at full size, on the meta device: the paper's 0.1M, 0.4M and LoRA's 0.8M."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion import EtherConfig, EtherLayer

SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def build(name: str):
    with torch.device("meta"):
        if name == "clip-l":
            return CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            )
        return UNet2DConditionModel(**(SD15 if name == "sd15" else SDXL))


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "method", "layers", "count"),
    [
        ("sd15", "ether", 128, 99_456),
        ("sd15", "ether_plus", 128, 398_592),
        ("clip-l", "ether", 48, 36_864),
        ("clip-l", "ether_plus", 48, 147_456),
        ("sdxl", "ether", 560, 785_920),
        ("sdxl", "ether_plus", 560, 2_903_040),
    ],
)
def test_the_default_targets_have_the_published_number_of_parameters(name, method, layers, count):
    model = build(name)
    model.add_adapter(EtherConfig(method=method))
    assert sum(isinstance(m, EtherLayer) for m in model.modules()) == layers
    assert trained(model) == count


@pytest.mark.parametrize("n", [2, 4])
def test_blocks_do_not_change_the_number_of_parameters(n):
    model = build("sd15")
    model.add_adapter(EtherConfig(num_blocks=n))
    assert trained(model) == 99_456


def test_lora_of_rank_4_has_eight_times_as_many():
    model = build("sd15")
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert trained(model) == 797_184
