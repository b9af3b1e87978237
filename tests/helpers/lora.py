"""Small pipelines of every family with adapters, and what LoRA files make of them."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from helpers.oracle import dense_weight
from helpers.pipelines import generate
from helpers.tiny import make_pipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


UNET = [*ATTENTION, "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "conv_in", "0.conv", "linear_1"]


FLUX_DOUBLE = [*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2", "norm1.linear"]


FLUX_DOUBLE = [rf"transformer_blocks\.0\..*\b{re.escape(name)}" for name in FLUX_DOUBLE]


FLUX_SINGLE = [r"single_transformer_blocks\.0\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"]


STRENGTHS = [1.0, 0.7]


def small_vae(latents: int, **fields) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
        **fields,
    ).eval()


def make_sdxl(tokenizer) -> StableDiffusionXLPipeline:
    """SDXL's own blocks, with fewer and narrower layers in them."""
    torch.manual_seed(0)
    config = make_pipeline(tokenizer).text_encoder.config
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1, 2),
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=small_vae(4),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )


def make_flux(tokenizer, **fields) -> FluxPipeline:
    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in letters)]
    t5 = T5Config(
        vocab_size=len(vocabulary),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    transformer = FluxTransformer2DModel(
        **(small | {"axes_dims_rope": (4, 4, 8)} | fields),
        patch_size=1,
        in_channels=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=make_pipeline(tokenizer).text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16),
        transformer=transformer.eval(),
    )


def targets_of(name: str, with_all: bool = True) -> dict[str, list[str] | str]:
    return {
        "sd": {"unet": UNET, "text_encoder": CLIP},
        "sdxl": {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP},
        "flux": {"transformer": "|".join(FLUX_DOUBLE + FLUX_SINGLE * with_all), "text_encoder": CLIP}
        | ({"text_encoder_2": ["q", "o", "wi_0", "wo"]} if with_all else {}),
    }[name]


def save_adapter(folder: Path, base: Path, name: str, targets: dict, seed: int, **fields) -> Path:
    """An adapter drawn at random on the target modules of every component, in a folder of that name."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(base)
    for component, modules in targets.items():
        config = EtherConfig(init_weights=False, target_modules=modules, **fields)
        getattr(pipe, component).add_adapter(config, adapter_name="default")
    pipe.save_ether_weights(folder / name)
    return folder / name


@dataclass
class Family:
    """A pipeline on disk with two adapters, and the image that they generate one on the other at STRENGTHS."""

    name: str
    base: Path
    adapters: list[Path]
    image: np.ndarray

    def open(self) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(self.base)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, *more: str) -> list[str]:
        strengths = map(str, STRENGTHS)
        return ["--base", str(self.base), "--adapter", *map(str, self.adapters), "--scale", *strengths, *more]


def generate_any(pipe: DiffusionPipeline) -> np.ndarray:
    flux = {"height": 16, "width": 16, "max_sequence_length": 16} if isinstance(pipe, FluxPipeline) else {}
    return generate(pipe, **flux)


def run_command(command, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


def lora_deltas(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """What the LoRA that is loaded adds to every weight, by component and path."""
    return {
        f"{component}.{path.removeprefix('text_model.')}": layer.get_delta_weight(next(iter(layer.lora_A))).double()
        for component, model in models_of(pipe).items()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora_A
    }


def dense_deltas(pipe: DiffusionPipeline, adapters: list[Path], strengths=STRENGTHS) -> dict[str, torch.Tensor]:
    """The same by the dense definition of ETHER, from the weights of the base and the vectors in the files."""
    deltas = {}
    weights = {
        f"{component}.{key.replace('text_model.', '')}": weight.double()
        for component, model in models_of(pipe).items()
        for key, weight in model.state_dict().items()
    }
    for adapter, strength in zip(adapters, strengths, strict=True):
        vectors: dict[str, dict[str, torch.Tensor]] = {}
        for component, tensors in read_adapter_file(adapter / WEIGHTS_NAME).tensors.items():
            for key, tensor in tensors.items():
                path, _, vector = key.replace("text_model.", "").rpartition(".")
                vectors.setdefault(f"{component}.{path}", {})[vector.removeprefix("ether_")] = tensor
        for path, found in vectors.items():
            base = weights[f"{path}.weight"]
            before = deltas.get(path, torch.zeros_like(base))
            deltas[path] = dense_weight(base + before, **found, strength=strength) - base
    return deltas


def assert_exact(pipe: DiffusionPipeline, expected: dict[str, torch.Tensor], tolerance=1e-6) -> None:
    found = lora_deltas(pipe)
    assert found.keys() >= expected.keys()
    for path, delta in found.items():  # parts of a fused layer that have no adapter are there, with zeros
        exact = expected.get(path, torch.zeros_like(delta))
        assert (delta - exact).norm() <= tolerance * exact.norm(), path


def record_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ether_export"])
