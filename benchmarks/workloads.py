"""What the speed benchmarks run on: denoisers of well-known shapes with random weights, and every method's adapter."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ether_diffusion import EtherConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DIT_TARGETS = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
# As in PEFT's own comparison of methods on image generation (method_comparison/image-gen).
FLUX2_TARGETS = [
    *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj", "linear_in", "linear_out",
]  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A denoiser, its inputs and its targets. `build` and `inputs` run under the device and dtype given here.

    pipeline: that the denoiser can stand in alone, to load adapters; None where there is none.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    gradient_checkpointing: bool = False
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    pipeline: type[DiffusionPipeline] | None = StableDiffusionPipeline


def unet_inputs(batch: int, side: int, width: int, *, sdxl: bool = False) -> dict[str, Tensor]:
    inputs = {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.randint(1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 77, width),
    }
    if sdxl:
        time_ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * batch)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280), "time_ids": time_ids}
    return inputs


def small_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet at a quarter of its width and half its depth: 21 M parameters."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(160, 320, 320),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def small_dit() -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer at a fifth of its width and a quarter of its depth: 22 M parameters."""
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=1024,
        caption_projection_dim=320,
        pooled_projection_dim=512,
        pos_embed_max_size=32,
    )


def dit_inputs(batch: int, side: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, 16, side, side),
        "encoder_hidden_states": torch.randn(batch, 77, 1024),
        "pooled_projections": torch.randn(batch, 512),
        "timestep": 1000 * torch.rand(batch),
    }


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux2_klein() -> Flux2Transformer2DModel:
    """The shape of FLUX.2 [klein] 4B: 5 double and 20 single blocks of width 3072."""
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=5,
        num_single_layers=20,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def flux2_inputs(batch: int = 2, side: int = 32, tokens: int = 512) -> dict[str, Tensor]:
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1)).float()
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(tokens)).float()
    return {
        "hidden_states": torch.randn(batch, side * side, 128),
        "encoder_hidden_states": torch.randn(batch, tokens, 7680),
        "timestep": torch.rand(batch),
        "img_ids": grid.expand(batch, -1, -1),
        "txt_ids": text.expand(batch, -1, -1),
    }


WORKLOADS = {
    "cpu-small": Workload(small_unet, lambda: unet_inputs(2, 32, 768)),
    "dit-small": Workload(
        small_dit, lambda: dit_inputs(2, 32), targets=DIT_TARGETS, pipeline=StableDiffusion3Pipeline
    ),
    "sd15-512": Workload(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        lambda: unet_inputs(4, 64, 768),
        torch.bfloat16,
        "cuda",
    ),
    "sdxl-1024": Workload(
        sdxl_unet, lambda: unet_inputs(1, 128, 2048, sdxl=True), torch.bfloat16, "cuda", gradient_checkpointing=True
    ),
    "flux2-klein-512": Workload(
        flux2_klein,
        flux2_inputs,
        torch.bfloat16,
        "cuda",
        gradient_checkpointing=True,
        targets=FLUX2_TARGETS,
        pipeline=None,
    ),
}


class DenseEther(nn.Module):
    """ETHER as the paper writes it: a dense reflection H is built and multiplied with the weight at every call."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.ether_u = nn.Parameter(
            nn.functional.normalize(torch.randn(base.in_features, device=base.weight.device), dim=0)
        )

    def forward(self, x: Tensor) -> Tensor:
        unit = self.ether_u / self.ether_u.norm()
        mirror = torch.eye(len(unit), device=unit.device) - 2 * torch.outer(unit, unit)
        weight = self.base_layer.weight @ mirror.to(self.base_layer.weight.dtype)
        return nn.functional.linear(x, weight, self.base_layer.bias)


def with_dense_ether(model: nn.Module, targets: list[str]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in targets):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, DenseEther(module))
    return model


METHODS: dict[str, Callable[[list[str]], peft.PeftConfig]] = {
    "ETHER": lambda targets: EtherConfig(target_modules=targets),
    "ETHER, 4 blocks": lambda targets: EtherConfig(target_modules=targets, num_blocks=4),
    "ETHER+": lambda targets: EtherConfig(target_modules=targets, method="ether_plus"),
    "LoRA r=1": lambda targets: peft.LoraConfig(target_modules=targets, r=1),
    "LoRA r=4": lambda targets: peft.LoraConfig(target_modules=targets, r=4),
    "OFT, block 32": lambda targets: peft.OFTConfig(target_modules=targets, oft_block_size=32),
    "BOFT": lambda targets: peft.BOFTConfig(target_modules=targets, boft_block_size=4),
    "HRA r=2": lambda targets: peft.HRAConfig(target_modules=targets, r=2),
    "VeRA": lambda targets: peft.VeraConfig(target_modules=targets),
}


def read_workloads(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the flags that the speed benchmarks share; makes --output_dir."""
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cpu-small"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if any(WORKLOADS[name].device == "cuda" for name in args.workloads) and not torch.cuda.is_available():
        parser.error("this workload needs a CUDA device; cpu-small and dit-small run anywhere")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args


def build(workload: Workload) -> tuple[nn.Module, dict[str, Tensor]]:
    """The frozen model and its inputs, with random weights from a fixed seed."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(workload.dtype)
    try:
        with torch.device(workload.device):
            model, inputs = workload.build(), workload.inputs()
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False), inputs


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def adapted(model: nn.Module, method: str, targets: list[str]) -> nn.Module:
    """A model over the weights of `model` with the adapter of a method (a key of METHODS, "dense" or "limit")."""
    torch.manual_seed(1)
    model = share(model)
    if method == "paper's dense ETHER":
        return with_dense_ether(model, targets)
    if method == "frozen limit":  # gradients flow through all of it, and one bias at its entrance is trained
        entrance = model.conv_in if hasattr(model, "conv_in") else model.context_embedder
        name = "bias" if entrance.bias is not None else "weight"
        setattr(entrance, name, nn.Parameter(getattr(entrance, name).detach().clone()))
        return model
    config = METHODS[method](targets)
    if isinstance(config, peft.VeraConfig):  # its layers share matrices that PEFT makes in a PeftModel alone
        model = peft.get_peft_model(model, config).base_model.model
    else:
        peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            any(part in name for part in ("ether_", "lora_", "oft_", "boft_", "hra_", "vera_lambda"))
        )
    return model
