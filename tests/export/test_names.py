"""The names of layers in kohya's files."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from helpers.lora import FLUX_SINGLE, STRENGTHS, generate_any, make_flux, save_adapter, targets_of
from safetensors.torch import load_file

from ether_diffusion import EtherConfig
from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.lora_files import Factors, finish, gather_parts, write_kohya
from ether_diffusion.export.merge import open_adapted
from ether_diffusion.export.names import kohya_place, stability_path

# sd-scripts names a layer `<prefix>.<module path>`, dots as underscores, in create_modules of networks/lora.py, with
# the prefixes LORA_PREFIX_* there; its U-Net has diffusers' paths for SD 1/2 and Stability's for SDXL
# (library/sdxl_original_unet.py). ComfyUI maps `lora_unet_<Stability's path>` and `lora_unet_<diffusers' path>`
# (comfy/lora.py, model_lora_keys_unet), and of text encoders the layers below (model_lora_keys_clip).
CLIP_NAME = r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"


INNER = r"(proj_in|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_2))"


NAMES = {
    "sd": rf"lora_te_{CLIP_NAME}|lora_unet_((down_blocks_\d|mid_block|up_blocks_\d)_"
    rf"(attentions_\d_{INNER}|resnets_\d_(conv1|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)"
    r"|conv_in|time_embedding_linear_1)",
    # Of SDXL's input blocks, 4, 5, 7 and 8 have attention, 3 and 6 are downsamplers; of its output blocks 0 to 5 have
    # attention, 2 and 5 an upsampler after it.
    "sdxl": rf"lora_te[12]_{CLIP_NAME}|lora_unet_((input_blocks_[4578]|middle_block|output_blocks_[0-5])_1_{INNER}"
    r"|(input_blocks_[124578]|middle_block|output_blocks_[0-8])_[02]_(in_layers_2|emb_layers_1|skip_connection)"
    r"|input_blocks_[36]_0_op|output_blocks_[25]_2_conv|input_blocks_0_0|time_embed_0|label_emb_0_0)",
    # networks/convert_flux_lora.py of sd-scripts lists the names of FLUX.1's layers.
    "flux": rf"lora_te1_{CLIP_NAME}|lora_unet_double_blocks_\d_(img|txt)_(attn_qkv|attn_proj|mlp_0|mlp_2)"
    r"|lora_te3_encoder_block_\d_layer_[01]_(SelfAttention_[qo]|DenseReluDense_(wi_0|wo))"
    r"|lora_unet_double_blocks_\d_img_mod_lin"
    r"|lora_unet_single_blocks_\d_(linear1|linear2|modulation_lin)",
}


def test_kohya_files_have_the_names_that_comfyui_and_sd_scripts_map(family, tmp_path):
    targets = targets_of(family.name)
    adapter = save_adapter(tmp_path, family.base, "all", targets, 3)
    pipe, names = open_adapted(family.base, [adapter])
    tensors = load_file(export_lora(pipe, tmp_path, to="kohya", adapter_names=names).path)
    layers = {key.partition(".")[0] for key in tensors}
    wrong = sorted(layer for layer in layers if not re.fullmatch(NAMES[family.name], layer))
    assert not wrong
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{layer}.{ending}" for layer in layers for ending in endings}
    for layer in layers:
        down, up = tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"]
        assert down.ndim == up.ndim and up.shape[1] == len(down) and set(up.shape[2:]) <= {1}
        assert tensors[f"{layer}.alpha"].dtype == torch.float32 and tensors[f"{layer}.alpha"].ndim == 0


def test_known_layers_of_the_full_models_have_their_known_names():
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            transformer_layers_per_block=(1, 2, 10),
        )
        sd = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=8)
    for unet, path, name in (
        (sdxl, "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
         "input_blocks.4.1.transformer_blocks.1.attn1.to_q"),
        (sdxl, "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"),
        (sdxl, "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        (sdxl, "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        (sdxl, "up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        (sdxl, "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (sdxl, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        (sdxl, "up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        (sd, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (sd, "up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
        (sd, "conv_out", "out.2"),
        (sd, "conv_norm_out", None),
        (sd, "mid_block.attentions.0.transformer_blocks.0.norm1", None),
        (sd, "down_blocks.0.resnets.0.norm1", None),
    ):  # fmt: skip
        assert stability_path(unet, path) == name
        unet.get_submodule(path)


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, ChromaTransformer2DModel])
def test_fused_layers_of_flux_are_read_back_part_by_part(kind, tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        models = {"transformer": kind(num_layers=1, num_single_layers=1)}
    single = "single_transformer_blocks.0"
    ranks = {"attn.to_q": 1, "attn.to_v": 3, "proj_mlp": 2}
    parts, deltas = [], {}
    for name, rank in ranks.items():
        place = kohya_place(models, "transformer", f"{single}.{name}")
        layer = models["transformer"].get_submodule(f"{single}.{name}")
        factors = Factors(torch.randn(rank, 3072).double(), torch.randn(layer.out_features, rank).double())
        parts.append((("transformer", place.name), place, factors))
        deltas[name] = factors
    stored = finish(gather_parts(parts), {parts[0][0]: (3072,)}, rank=None, dtype=torch.float32, one_alpha=True)
    assert stored["transformer", "lora_unet_single_blocks_0_linear1"].up.shape == (21504, 12)
    write_kohya(tmp_path / "lora.safetensors", None, stored, {})
    read = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        down, up = (read[f"transformer.{single}.{name}.lora_{letter}.weight"] for letter in "AB")
        if name in deltas:
            x = torch.randn(3072, 2)
            assert torch.allclose(
                up @ (down @ x), (deltas[name].up @ (deltas[name].down @ x.double())).float(), atol=1e-2
            )
        else:
            assert not up.any()


@pytest.mark.slow
def test_a_single_block_of_flux_at_full_width_generates_the_same_image(tiny_tokenizer, tmp_path):
    """141 million weights: diffusers reads FLUX's fused layers back at this width only."""
    width = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    pipe = make_flux(tiny_tokenizer, num_layers=0, **width)
    pipe.set_progress_bar_config(disable=True)
    base = generate_any(pipe)
    for name, method in (("dog", "ether"), ("style", "ether_plus")):
        config = EtherConfig(method=method, init_weights=False, target_modules=FLUX_SINGLE[0])
        pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.set_adapters(["dog", "style"], STRENGTHS)
    image = generate_any(pipe)
    report = export_lora(pipe, tmp_path, to="kohya")
    assert max(report.errors.values()) <= 1e-6
    pipe.unload_ether_weights()
    pipe.load_lora_weights(report.path)
    # Few directions of 3,072 in one block of random weights move the image by less than a grey level.
    assert np.abs(generate_any(pipe) - image).max() <= 0.01 * np.abs(image - base).max()
