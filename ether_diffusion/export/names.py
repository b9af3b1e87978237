"""The names that LoRA layers have in kohya's files, which sd-scripts and musubi-tuner write and ComfyUI maps.

A layer is `<prefix>_<module path, dots as underscores>`, with `.lora_down.weight`, `.lora_up.weight` and `.alpha`.
ComfyUI maps `lora_unet_` and the module path that the layer has in its own model (comfy/lora.py,
`model_lora_keys_unet`), so those are the paths here, and where its model has one layer for q, k, v, so does the file.

| family | denoiser, after `lora_unet_` | text encoders |
|---|---|---|
| SD 1, 2 | diffusers' paths | `lora_te` |
| SDXL | Stability's paths (`input_blocks_4_1_…`) | `lora_te1`, `lora_te2` |
| FLUX.1, Kontext | BFL's paths, where q, k, v (and the MLP) are one layer | `lora_te1` (CLIP), `lora_te3` (T5) |
| Chroma | as FLUX.1 | none |
| FLUX.2 | BFL's paths, q, k, v one layer; single blocks' projections are one layer in diffusers, too | none |
| SD3, 3.5 | Stability's paths (`joint_blocks_0_x_block_attn_qkv`) | `lora_te1`, `lora_te2` (CLIP), `lora_te3` (T5) |
| Qwen-Image, Edit | diffusers' paths | none |
| Z-Image | `layers_0_attention_qkv`, `…_out`, `…_feed_forward_w1`, as Lumina2's | none |
| Lumina2 | `layers_0_attention_qkv`, `…_out`, `…_feed_forward_w1` | none |

CLIP's paths begin with `text_model_`. docs/export.md says which file of which project each rule is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from ether_diffusion.adapters.schema import canonical_path

PREFIXES = {
    "SD 1/2": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "SDXL": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "FLUX.1": {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "Chroma": {"transformer": "lora_unet"},
    "FLUX.2": {"transformer": "lora_unet"},
    "SD3": {
        "transformer": "lora_unet",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    },
    "Qwen-Image": {"transformer": "lora_unet"},
    "Z-Image": {"transformer": "lora_unet"},
    "Lumina2": {"transformer": "lora_unet"},
}

UNREAD_BY_DIFFUSERS = ("SD3", "Lumina2")
"""Families of whose kohya files diffusers has no reader: `load_lora_weights` passes over all of one, as a warning."""

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

# Transformers: blocks in diffusers -> blocks in kohya's files, and for each layer there the layers here that make it
# up, in the order of its outputs.
BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")
Layers = Mapping[str, tuple[str, ...]]
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX_DOUBLE: Layers = {
    "img_attn_qkv": QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ADDED_QKV,
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
}
FLUX_SINGLE: Layers = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",)}
QWEN_LEAVES = (*QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out", "img_mod.1", "txt_mod.1")
QWEN_LEAVES += ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
Z_IMAGE: Layers = {
    "attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention_out": ("attention.to_out.0",),
    **{f"feed_forward_w{k}": (f"feed_forward.w{k}",) for k in (1, 2, 3)},
    "adaLN_modulation_0": ("adaLN_modulation.0",),
}
LUMINA2: Layers = {
    "attention_qkv": QKV,
    "attention_out": ("attn.to_out.0",),
    **{f"feed_forward_w{k}": (f"feed_forward.linear_{k}",) for k in (1, 2, 3)},
    "adaLN_modulation_1": ("norm1.linear",),
}
LUMINA_BLOCKS = ("layers", "noise_refiner", "context_refiner")
BLOCKS: dict[str, dict[str, tuple[str, Layers]]] = {
    "FLUX.1": {
        "transformer_blocks": (
            "double_blocks",
            {**FLUX_DOUBLE, "img_mod_lin": ("norm1.linear",), "txt_mod_lin": ("norm1_context.linear",)},
        ),
        "single_transformer_blocks": ("single_blocks", {**FLUX_SINGLE, "modulation_lin": ("norm.linear",)}),
    },
    "Chroma": {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
    "FLUX.2": {
        "transformer_blocks": (
            "double_blocks",
            {
                "img_attn_qkv": QKV,
                "img_attn_proj": ("attn.to_out.0",),
                "txt_attn_qkv": ADDED_QKV,
                "txt_attn_proj": ("attn.to_add_out",),
                "img_mlp_0": ("ff.linear_in",),
                "img_mlp_2": ("ff.linear_out",),
                "txt_mlp_0": ("ff_context.linear_in",),
                "txt_mlp_2": ("ff_context.linear_out",),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ),
    },
    "SD3": {
        "transformer_blocks": (
            "joint_blocks",
            {
                "x_block_attn_qkv": QKV,
                "x_block_attn_proj": ("attn.to_out.0",),
                "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "x_block_attn2_proj": ("attn2.to_out.0",),
                "x_block_mlp_fc1": ("ff.net.0.proj",),
                "x_block_mlp_fc2": ("ff.net.2",),
                "x_block_adaLN_modulation_1": ("norm1.linear",),
                "context_block_attn_qkv": ADDED_QKV,
                "context_block_attn_proj": ("attn.to_add_out",),
                "context_block_mlp_fc1": ("ff_context.net.0.proj",),
                "context_block_mlp_fc2": ("ff_context.net.2",),
                "context_block_adaLN_modulation_1": ("norm1_context.linear",),
            },
        )
    },
    "Qwen-Image": {
        "transformer_blocks": ("transformer_blocks", {leaf.replace(".", "_"): (leaf,) for leaf in QWEN_LEAVES})
    },
    "Z-Image": {blocks: (blocks, Z_IMAGE) for blocks in LUMINA_BLOCKS},
    "Lumina2": {blocks: (blocks, LUMINA2) for blocks in LUMINA_BLOCKS},
}
TRANSFORMERS: dict[type[nn.Module], str] = {
    FluxTransformer2DModel: "FLUX.1",
    ChromaTransformer2DModel: "Chroma",
    Flux2Transformer2DModel: "FLUX.2",
    SD3Transformer2DModel: "SD3",
    QwenImageTransformer2DModel: "Qwen-Image",
    ZImageTransformer2DModel: "Z-Image",
    Lumina2Transformer2DModel: "Lumina2",
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
    unet, transformer = models.get("unet"), models.get("transformer")
    for kind, family in TRANSFORMERS.items():
        if isinstance(transformer, kind):
            return family
    if isinstance(unet, UNet2DConditionModel):
        return "SDXL" if unet.config.addition_embed_type == "text_time" else "SD 1/2"
    raise ValueError(
        f"kohya's names are known here for {', '.join(PREFIXES)}, not for a {type(unet or transformer).__name__}"
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
    elif prefix and family in BLOCKS:
        found = _place_in_block(BLOCKS[family], model, path)
    elif prefix and (name := stability_path(model, path)):
        found = own_place(name if family == "SDXL" else path, model.get_submodule(path))
    if found is None:
        raise ValueError(
            f"{component}.{path} has no name in kohya's format for {family} that programs map: leave it out of the "
            "adapter"
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


def _place_in_block(blocks: Mapping[str, tuple[str, Layers]], transformer: nn.Module, path: str) -> Place | None:
    match = BLOCK.fullmatch(path)
    if match is None or match[1] not in blocks:
        return None
    stack, index, leaf = match.groups()
    # The last block of SD3 ends with a norm whose scale and shift stand in the other order in Stability's model.
    if leaf == "norm1_context.linear" and isinstance(
        transformer.get_submodule(f"{stack}.{index}.norm1_context"), AdaLayerNormContinuous
    ):
        return None
    kohya_blocks, layers = blocks[stack]
    for name, parts in layers.items():
        if leaf in parts:
            widths = tuple(outputs_of(transformer.get_submodule(f"{stack}.{index}.{part}")) for part in parts)
            return Place(f"{kohya_blocks}.{index}.{name}", parts.index(leaf), widths)
    return None
