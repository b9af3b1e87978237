"""Small random pipelines of the transformers with flow matching, with real text encoders and their own tokenizers.

Each is built by a function of its name from nothing; `PIPELINES` has them all.
"""

from collections.abc import Callable

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from helpers.flow_parts import (
    MISTRAL_CHAT,
    autoencoder,
    clip_model,
    deep_compression_autoencoder,
    flux2_autoencoder,
    flux2_transformer,
    gemma2_model,
    gemma_tokenizer,
    mistral_model,
    qwen3_model,
    qwen3_vl_model,
    qwen_autoencoder,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl_model,
    t5_model,
    t5_tokenizer,
)
from helpers.tiny import make_tokenizer
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def flux(folder, kind: type[DiffusionPipeline] = FluxPipeline, *, guidance: bool = True) -> DiffusionPipeline:
    clip = make_tokenizer(folder / "clip")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_model(clip, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=t5_model(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def kontext(folder) -> DiffusionPipeline:
    return flux(folder, FluxKontextPipeline)


def klein(folder, layers: int = 28) -> DiffusionPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=qwen3_model(Qwen3ForCausalLM, layers),  # the pipeline reads the states of 9, 18 and 27
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(guidance=False),
    )


def flux2(folder) -> DiffusionPipeline:
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=mistral_model(layers=31),  # the pipeline reads the states of 10, 20 and 30
        tokenizer=qwen_tokenizer(MISTRAL_CHAT),
        transformer=flux2_transformer(guidance=True),
    )


def sd3(folder) -> DiffusionPipeline:
    clip = make_tokenizer(folder / "clip")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_model(clip, CLIPTextModelWithProjection),
        tokenizer=clip,
        text_encoder_2=clip_model(clip, CLIPTextModelWithProjection),
        tokenizer_2=clip,
        text_encoder_3=t5_model(),
        tokenizer_3=t5_tokenizer(),
    )


def qwen(folder, kind: type[DiffusionPipeline] = QwenImagePipeline, levels: int = 3, **parts) -> DiffusionPipeline:
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=qwen_autoencoder(levels),
        text_encoder=qwen_vl_model(),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        **parts,
    )


def qwen_edit(folder, kind: type[DiffusionPipeline] = QwenImageEditPipeline) -> DiffusionPipeline:
    # A factor of 32: the pipeline enlarges a reference image to 1024 × 1024 pixels.
    return qwen(folder, kind, levels=6, processor=qwen_processor())


def qwen_edit_plus(folder) -> DiffusionPipeline:
    return qwen_edit(folder, QwenImageEditPlusPipeline)


def z_image(folder) -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # which the class leaves as memory has it
            torch.nn.init.normal_(parameter)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=qwen3_model(Qwen3Model),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def chroma(folder) -> DiffusionPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=t5_model(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def sana(folder) -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=16,
        timestep_scale=0.5,
    )
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2_model(),
        vae=deep_compression_autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )


def lumina2(folder) -> DiffusionPipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(levels=4),  # the pipeline takes a factor of 8 for granted
        text_encoder=gemma2_model(),
        tokenizer=gemma_tokenizer(),
    )


def krea2(folder) -> DiffusionPipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_autoencoder(),
        text_encoder=qwen3_vl_model(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux": flux,
    "kontext": kontext,
    "klein": klein,
    "flux2": flux2,
    "sd3": sd3,
    "qwen": qwen,
    "z_image": z_image,
    "chroma": chroma,
    "sana": sana,
    "lumina2": lumina2,
    "krea2": krea2,
}
WITH_PROCESSORS: dict[str, Callable[..., DiffusionPipeline]] = {
    "qwen_edit": qwen_edit,
    "qwen_edit_plus": qwen_edit_plus,
}
"""Pipelines whose text encoders see images, which transformers prepares by means of torchvision."""


SIDES = {
    "qwen_edit": 64,
    "qwen_edit_plus": 64,
    "sana": 32,
    "lumina2": 32,
}
"""Side of the smallest square in pixels, where it is not 16."""
SIZED = {
    "sana": {"use_resolution_binning": False},
}
"""What makes a pipeline generate the size that it is asked for."""


def make(name: str, folder, seed: int = 0) -> DiffusionPipeline:
    """One of the pipelines, its weights from a seed; the folder takes the files of a tokenizer."""
    torch.manual_seed(seed)
    pipe = (PIPELINES | WITH_PROCESSORS)[name](folder)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
