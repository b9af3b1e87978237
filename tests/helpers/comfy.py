"""What ComfyUI makes of LoRA files: the layer of its own model that each of diffusers' layers is, as it maps them.

Written down from comfy/lora.py (`model_lora_keys_unet`) and comfy/utils.py (`flux_to_diffusers`,
`mmdit_to_diffusers`, `z_image_to_diffusers`, `krea2_to_diffusers`), independently of the package's tables.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

FLUX = {
    r"transformer_blocks\.(\d+)\.attn\.to_[qkv]": r"double_blocks.\1.img_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj": r"double_blocks.\1.txt_attn.qkv",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
    r"transformer_blocks\.(\d+)\.ff\.(net\.0\.proj|linear_in)": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks\.(\d+)\.ff\.(net\.2|linear_out)": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks\.(\d+)\.ff_context\.(net\.0\.proj|linear_in)": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks\.(\d+)\.ff_context\.(net\.2|linear_out)": r"double_blocks.\1.txt_mlp.2",
    r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    r"single_transformer_blocks\.(\d+)\.(proj_out|attn\.to_out)": r"single_blocks.\1.linear2",
    r"single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
}
SD3 = {
    r"transformer_blocks\.(\d+)\.attn\.to_[qkv]": r"joint_blocks.\1.x_block.attn.qkv",
    r"transformer_blocks\.(\d+)\.attn2\.to_[qkv]": r"joint_blocks.\1.x_block.attn2.qkv",
    r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj": r"joint_blocks.\1.context_block.attn.qkv",
    r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0": r"joint_blocks.\1.x_block.\2.proj",
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
    r"transformer_blocks\.(\d+)\.norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": r"joint_blocks.\1.context_block.adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
}
Z_IMAGE = {
    r"(layers|\w+_refiner)\.(\d+)\.attention\.to_[qkv]": r"\1.\2.attention.qkv",
    r"(layers|\w+_refiner)\.(\d+)\.attention\.to_out\.0": r"\1.\2.attention.out",
    r"((layers|\w+_refiner)\.\d+\.(feed_forward\.w[123]|adaLN_modulation\.0))": r"\1",
}
LUMINA2 = {  # by the names of its own model alone
    r"(layers|\w+_refiner)\.(\d+)\.attn\.to_[qkv]": r"\1.\2.attention.qkv",
    r"(layers|\w+_refiner)\.(\d+)\.attn\.to_out\.0": r"\1.\2.attention.out",
    r"(layers|\w+_refiner)\.(\d+)\.feed_forward\.linear_([123])": r"\1.\2.feed_forward.w\3",
    r"(layers|\w+_refiner)\.(\d+)\.norm1\.linear": r"\1.\2.adaLN_modulation.1",
}
QWEN = {r"(transformer_blocks\.\d+\.(attn|(img|txt)_(mlp|mod))\..+)": r"\1"}
KREA2 = {  # which has no kohya names
    r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": r"blocks.\1.attn.w\2",
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": r"blocks.\1.attn.wo",
    r"transformer_blocks\.(\d+)\.attn\.to_gate": r"blocks.\1.attn.gate",
    r"transformer_blocks\.(\d+)\.ff\.(gate|up|down)": r"blocks.\1.mlp.\2",
    r"text_fusion\.(\w+_blocks\.\d+)\.(attn\.to_.+|ff\..+)": r"txtfusion.\1.\2",
}
NAMES = {"flux": FLUX, "kontext": FLUX, "chroma": FLUX, "klein": FLUX, "flux2": FLUX, "sd3": SD3, "qwen": QWEN}
NAMES |= {"z_image": Z_IMAGE, "lumina2": LUMINA2, "krea2": KREA2}


def own_name(family: str, path: str) -> str | None:
    """The path in ComfyUI's model of the layer that diffusers has at a path."""
    for pattern, replacement in NAMES[family].items():
        if match := re.fullmatch(pattern, path):
            return match.expand(replacement)
    return None


def _rank(path: str) -> int:
    """Where a layer stands among those that ComfyUI has as one."""
    letter = re.search(r"\.(?:to|add)_([qkv])(?:_proj)?$", path)
    return "qkv".index(letter[1]) if letter else 3


def deltas_of(family: str, transformer: nn.Module, file: Path) -> dict[str, torch.Tensor]:
    """What a kohya file adds to every weight of diffusers' layers, when it is added to ComfyUI's model.

    Layers that ComfyUI has as one hold the rows of diffusers' in the order of q, k, v and the MLP.
    """
    tensors = {key: tensor.double() for key, tensor in load_file(file).items()}
    layers: dict[str, list[str]] = {}
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name := own_name(family, path)):
            layers.setdefault(f"lora_unet_{name.replace('.', '_')}", []).append(path)
    found = {}
    for name, paths in layers.items():
        if f"{name}.lora_up.weight" not in tensors:
            continue
        down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
        delta = tensors.pop(f"{name}.alpha") / len(down) * up @ down
        order = sorted(paths, key=_rank)
        widths = [transformer.get_submodule(path).out_features for path in order]
        found |= {f"transformer.{p}": part for p, part in zip(order, delta.split(widths), strict=True)}
    assert not tensors, f"names that it does not map: {sorted(tensors)}"
    return found
