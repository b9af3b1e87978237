"""Parameter counts at full size, on the meta device: the paper's 0.1M, 0.4M and LoRA's 0.8M."""

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.training.full_size import SDXL_UNET

SD15 = {"cross_attention_dim": 768, "sample_size": 64}


def build(name: str):
    with torch.device("meta"):
        if name == "clip-l":
            return CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            )
        return UNet2DConditionModel(**(SD15 if name == "sd15" else SDXL_UNET))


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


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN |= {"guidance_embeds": False}
HIDREAM = {"num_attention_heads": 20, "attention_head_dim": 128, "num_layers": 16, "num_single_layers": 32}
HIDREAM |= {"in_channels": 16, "patch_size": 2, "caption_channels": [4096, 4096], "text_emb_dim": 2048}
HIDREAM |= {"axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16]}
KREA2_BLOCKS = r"transformer_blocks\..*(to_[qkv]|to_gate|to_out\.0)"
EVERY_PROJECTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out"]
TRANSFORMERS = {  # class, what differs from its defaults, targets, layers, numbers of ETHER, ETHER+ and LoRA of rank 4
    "FLUX.1": ("Flux", {}, ATTENTION, 190, 583_680, 2_334_720, 4_669_440),
    "FLUX.2 klein-4B": ("Flux2", KLEIN, None, 60, 368_640, 2_088_960, 4_177_920),
    "FLUX.2 klein-4B, every projection": (
        "Flux2", KLEIN, [*EVERY_PROJECTION, "to_qkv_mlp_proj"], 80, 307_200, 2_396_160, 4_792_320,
    ),
    "Qwen-Image": ("QwenImage", {}, ATTENTION, 240, 737_280, 2_949_120, 5_898_240),
    "Z-Image": ("ZImage", {}, ATTENTION, 136, 522_240, 2_088_960, 4_177_920),
    "Lumina2": ("Lumina2", {}, ATTENTION, 120, 276_480, 921_600, 1_843_200),
    "HiDream": ("HiDreamImage", HIDREAM, ["to_q", "to_k", "to_v", "to_out"], 192, 491_520, 1_966_080, 3_932_160),
    "Sana": ("Sana", {}, ATTENTION, 160, 358_400, 1_433_600, 2_867_200),
    "Krea 2": ("Krea2", {}, KREA2_BLOCKS, 140, 860_160, 2_924_544, 5_849_088),
    "Krea 2 with its text fusion": ("Krea2", {}, [*ATTENTION, "to_gate"], 160, 911_360, 3_129_344, 6_258_688),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_with_flow_matching_have_the_published_number_of_parameters(name):
    kind, differing, targets, layers, *counts = TRANSFORMERS[name]
    with torch.device("meta"):
        model = getattr(diffusers, f"{kind}Transformer2DModel")(**differing)
    found = []
    for method in ("ether", "ether_plus"):
        model.add_adapter(EtherConfig(method=method, target_modules=targets), adapter_name=method)
        ether = [m for m in model.modules() if isinstance(m, EtherLayer)]
        found.append(sum(v.numel() for m in ether for v in m.vectors(method) if v is not None))
    assert [len(ether), *found] == [layers, *counts[:2]]
    assert sum(4 * (m.in_features + m.out_features) for m in ether) == counts[2]
