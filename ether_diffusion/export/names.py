"""The names that LoRA layers have in kohya's files, which sd-scripts writes and ComfyUI and A1111-like programs map.

A layer is `<prefix>_<module path, dots as underscores>`, with `.lora_down.weight`, `.lora_up.weight` and `.alpha`.

| family | denoiser | text encoders |
|---|---|---|
| SD 1, 2 | `lora_unet`, diffusers' paths | `lora_te` |
| SDXL | `lora_unet`, Stability's paths (`input_blocks_4_1_…`) | `lora_te1`, `lora_te2` |
| FLUX.1 | `lora_unet`, BFL's paths, where q, k, v (and the MLP) are one layer | `lora_te1` (CLIP), `lora_te3` (T5) |

CLIP's paths begin with `text_model_`. docs/export.md says which file of which project each rule is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from ether_diffusion.adapters.schema import canonical_path

PREFIXES = {
    "SD 1/2": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "SDXL": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "FLUX.1": {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
}

TEXT_LAYER = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"  # CLIP
    r"|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))"  # T5
)

# A UNet's layers, diffusers' path to Stability's.
UNET_STEM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_BLOCK = re.compile(
    r"(?:(down_blocks|up_blocks)\.(\d+)|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
UNET_ATTENTION = re.compile(
    r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
)
UNET_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

# FLUX.1: blocks in diffusers -> blocks in kohya's files, and for each layer there the layers here that make it
# up, in the order of its outputs.
FLUX_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")
FLUX_LAYERS = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn_proj": ("attn.to_out.0",),
            "img_mlp_0": ("ff.net.0.proj",),
            "img_mlp_2": ("ff.net.2",),
            "img_mod_lin": ("norm1.linear",),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp_0": ("ff_context.net.0.proj",),
            "txt_mlp_2": ("ff_context.net.2",),
            "txt_mod_lin": ("norm1_context.linear",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation_lin": ("norm.linear",),
        },
    ),
}


class Place(NamedTuple):
    """Where a layer is in a file: its outputs are those of one part of the layer `name`."""

    name: str
    part: int
    widths: tuple[int, ...]  # outputs of every part

    @property
    def rows(self) -> slice:
        """The layer's own outputs among all of `name`."""
        first = sum(self.widths[: self.part])
        return slice(first, first + self.widths[self.part])


def own_place(name: str, layer: nn.Module) -> Place:
    """The place of a layer that has one to itself."""
    return Place(name, 0, (outputs_of(layer),))


def outputs_of(layer: nn.Module) -> int:
    """The number of outputs of a Linear or Conv2d, adapted or not."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def family_of(models: Mapping[str, nn.Module]) -> str:
    """Which names a pipeline's layers have: a key of PREFIXES.

    Raises:
        ValueError: an architecture whose names are not known here.
    """
    unet = models.get("unet")
    if isinstance(models.get("transformer"), FluxTransformer2DModel):
        return "FLUX.1"
    if isinstance(unet, UNet2DConditionModel):
        return "SDXL" if unet.config.addition_embed_type == "text_time" else "SD 1/2"
    denoiser = unet or models.get("transformer")
    raise ValueError(
        f"kohya's names are known here for {', '.join(PREFIXES)}, not for a {type(denoiser).__name__}; "
        "peft-lora fits every model"
    )


def kohya_place(models: Mapping[str, nn.Module], component: str, path: str) -> Place:
    """The place in kohya's file of the layer at a module path of a component.

    Raises:
        ValueError: a layer or component that kohya's format has no name for; names it.
    """
    family, model = family_of(models), models[component]
    prefix, canonical = PREFIXES[family].get(component), canonical_path(component, path)
    found: Place | None = None
    if prefix and component.startswith("text_encoder"):
        found = own_place(canonical, model.get_submodule(path)) if TEXT_LAYER.fullmatch(canonical) else None
    elif prefix and family == "FLUX.1":
        found = _flux_place(model, path)
    elif prefix and (name := stability_path(model, path)):
        found = own_place(name if family == "SDXL" else path, model.get_submodule(path))
    if found is None:
        raise ValueError(
            f"{component}.{path} has no name in kohya's format for {family} that programs map; leave it out of the "
            "adapter, or export to peft-lora"
        )
    return found._replace(name=f"{prefix}_{found.name}".replace(".", "_"))


def stability_path(unet: UNet2DConditionModel, path: str) -> str | None:
    """Stability's module path of a UNet's layer, which counts the blocks in one row; None: it has none.

    With l layers per block, layer j of down block b is input block 1 + b(l + 1) + j, its downsampler the block after
    the last; layer j of up block b is output block b(l + 1) + j, its upsampler a further step in the last of them.
    """
    if path in UNET_STEM:
        return UNET_STEM[path]
    match, layers = UNET_BLOCK.fullmatch(path), unet.config.layers_per_block
    if match is None or not isinstance(layers, int):
        return None
    side, block, kind, index, leaf = match.groups()
    column = int(block or 0) * (layers + 1)
    if (side, kind, leaf) == ("down_blocks", "downsamplers", "conv"):
        return f"input_blocks.{column + layers + 1}.0.op"
    if (side, kind, leaf) == ("up_blocks", "upsamplers", "conv"):
        attends = bool(getattr(unet.up_blocks[int(block)], "attentions", None))
        return f"output_blocks.{column + layers}.{1 + attends}.conv"
    if kind == "attentions" and UNET_ATTENTION.fullmatch(leaf):
        step, inner = 1, leaf
    elif kind == "resnets" and leaf in UNET_RESNET:
        step, inner = 0, UNET_RESNET[leaf]
    else:
        return None
    if side == "down_blocks":
        return f"input_blocks.{column + 1 + int(index)}.{step}.{inner}"
    if side == "up_blocks":
        return f"output_blocks.{column + int(index)}.{step}.{inner}"
    return f"middle_block.{1 if step else 2 * int(index)}.{inner}"


def _flux_place(transformer: FluxTransformer2DModel, path: str) -> Place | None:
    match = FLUX_BLOCK.fullmatch(path)
    if match is None:
        return None
    blocks, index, leaf = match.groups()
    kohya_blocks, layers = FLUX_LAYERS[blocks]
    for name, parts in layers.items():
        if leaf in parts:
            widths = tuple(outputs_of(transformer.get_submodule(f"{blocks}.{index}.{part}")) for part in parts)
            return Place(f"{kohya_blocks}.{index}.{name}", parts.index(leaf), widths)
    return None
