"""A pipeline as one file, under the names of the code that Stable Diffusion was first published with."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str, layers: int) -> str:
    """The name of a UNet's tensor in such a file."""
    for end, other in ENDS.items():
        if name.startswith(f"{end}."):
            return name.replace(end, other, 1)
    side, *parts = name.split(".")
    if side == "mid_block":
        kind, number, *rest = parts
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, *rest = parts
        each = layers + (side == "up_blocks")
        if kind in ("resnets", "attentions"):
            at = int(block) * (layers + 1) + int(number) + (side == "down_blocks")
            place = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{at}.{int(kind == 'attentions')}"
        elif kind == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest[-1]}"
        else:
            return f"output_blocks.{int(block) * each + layers}.{2 if block != '0' else 1}.conv.{rest[-1]}"
    rest = ".".join(rest)
    return f"{place}.{RESNET.get(rest.rpartition('.')[0], rest.rpartition('.')[0])}.{rest.rpartition('.')[2]}"


def vae_name(name: str, blocks: int) -> str:
    """The name of an autoencoder's tensor in such a file."""
    for ours, theirs in VAE_NAMES.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    parts = name.split(".")
    if len(parts) > 1 and parts[1] in ("down_blocks", "up_blocks"):
        up = parts[1] == "up_blocks"
        parts[1:3] = [parts[1].removesuffix("_blocks"), str(blocks - 1 - int(parts[2])) if up else parts[2]]
        parts = ["block" if part == "resnets" else part for part in parts]
    return ".".join(parts)


def write_single_file(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Save all weights of a pipeline in one file."""
    tensors = {}
    layers, blocks = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers)}"] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        is_attention = ".attentions." in name and tensor.ndim == 2
        tensors[f"first_stage_model.{vae_name(name, blocks)}"] = tensor[..., None, None] if is_attention else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def all_equal(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    """Whether two models have the same weights under the same names."""
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
