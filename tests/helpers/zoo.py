"""Small random pipelines of other architectures than `conftest`'s, built from its parts."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ether_diffusion import ControlEncoder, EtherConfig, EtherLayer, control_pipeline_class
from ether_diffusion.control.controlnets import with_controlnet

STEM = ["controlnet_cond_embedding", "controlnet_mid_block"]


def controlnet(tiny) -> StableDiffusionControlNetPipeline:
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(tiny.unet, conditioning_embedding_out_channels=(8, 8), load_weights_from_unet=True)
    for module in (net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block, *net.controlnet_down_blocks):
        torch.nn.init.normal_(module.weight, std=0.1)  # they start at zero: nothing of the ControlNet would be seen
    parts = {name: part for name, part in tiny.components.items() if name != "image_encoder"}
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=net.eval(), requires_safety_checker=False))


def sdxl(tiny) -> StableDiffusionXLPipeline:
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
    )
    config = CLIPTextConfig(**tiny.text_encoder.config.to_dict() | {"projection_dim": 16})
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny.vae,
            text_encoder=CLIPTextModel(config).eval(),
            text_encoder_2=CLIPTextModelWithProjection(config).eval(),
            tokenizer=tiny.tokenizer,
            tokenizer_2=tiny.tokenizer,
            unet=unet.eval(),
            scheduler=tiny.scheduler,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    )


def flux(tiny) -> FluxPipeline:
    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    t5 = T5Config(
        vocab_size=len(tiny.tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
    )
    return quiet(
        FluxPipeline(
            transformer=transformer.eval(),
            vae=vae.eval(),
            text_encoder=tiny.text_encoder,
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer=tiny.tokenizer,
            tokenizer_2=tiny.tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapt_components(
    pipe: DiffusionPipeline, *components: str, name: str = "default", seed: int = 1, **fields
) -> dict:
    """Put a random adapter on the named components; returns its vectors, as a file holds them."""
    torch.manual_seed(seed)
    for component in components:
        inject_adapter_in_model(EtherConfig(init_weights=False, **fields), getattr(pipe, component), name)
    return pipe.ether_state_dict(name)


def ether_layers_of(pipe: DiffusionPipeline) -> list[EtherLayer]:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [module for model in models for module in model.modules() if isinstance(module, EtherLayer)]


def save_control(kind: str, base: Path, folder: Path, *, vectors: bool = True) -> Path:
    """What control training leaves: "light", with an encoder, or "controlnet", with two modules."""
    stock = DiffusionPipeline.from_pretrained(base)
    encoder = ControlEncoder.for_denoiser(stock.unet, factor=stock.vae_scale_factor)
    if kind == "light":
        pipe, component = control_pipeline_class(type(stock)).from_pipe(stock), "unet"
        pipe.add_control("default", encoder)
    else:
        widths = encoder.config.block_out_channels
        net = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=widths)
        pipe, component = with_controlnet(stock, net), "controlnet"
    if vectors:
        adapt_components(pipe, component, num_blocks=2, target_modules=["to_q"])
    whole = {"replaced_modules": {"controlnet": STEM}} if kind == "controlnet" else {}
    return pipe.save_ether_weights(folder, "default", **whole)


def strengths(pipe, component: str, name: str) -> set[float]:
    return {m.scaling[name] for m in getattr(pipe, component).modules() if isinstance(m, EtherLayer)}
