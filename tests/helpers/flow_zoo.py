"""Small random pipelines of the transformers with flow matching, with real text encoders and their own tokenizers.

Each is built by a function of its name from nothing; `PIPELINES` has them all.
"""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from helpers.tiny import make_tokenizer
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


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


def klein(folder) -> DiffusionPipeline:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3_model(Qwen3ForCausalLM, layers=28),  # the pipeline reads the states of 9, 18 and 27
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
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


def qwen(folder) -> DiffusionPipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=qwen_autoencoder(),
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
    )


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
        scheduler=FlowMatchEulerDiscreteScheduler(),
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
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    return SanaPipeline(
        tokenizer=qwen_tokenizer(),
        text_encoder=gemma2_model(),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
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
        vae=autoencoder(),
        text_encoder=gemma2_model(),
        tokenizer=qwen_tokenizer(),
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
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15),
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
    "sd3": sd3,
    "qwen": qwen,
    "z_image": z_image,
    "chroma": chroma,
    "sana": sana,
    "lumina2": lumina2,
    "krea2": krea2,
}


def make(name: str, folder, seed: int = 0) -> DiffusionPipeline:
    """One of the pipelines, its weights from a seed; the folder takes the files of a tokenizer."""
    torch.manual_seed(seed)
    pipe = PIPELINES[name](folder)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline, **options) -> np.ndarray:
    """A small image of a pipeline, always from the same noise; of an editor, of a red square."""
    known = inspect.signature(pipe.__call__).parameters
    usual = {"max_sequence_length": 32, "use_resolution_binning": False}
    usual |= {"system_prompt": "", "complex_human_instruction": None}  # they would leave no room for the prompt
    if isinstance(pipe, FluxKontextPipeline):
        usual |= {"image": Image.new("RGB", (32, 32), "red"), "max_area": 32 * 32, "_auto_resize": False}
    usual |= {"height": 32, "width": 32, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    fitting = {name: value for name, value in usual.items() if name in known}
    return pipe(prompt="a dog", output_type="np", **fitting, **options).images[0]


# Parts ----------------------------------------------------------------------------------------------------------


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )


def clip_model(tokenizer: CLIPTokenizer, kind: type[CLIPTextModel]) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)] + [(chr(c), -3.0) for c in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)


def t5_model() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {byte: k for k, byte in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + k for k, token in enumerate(SPECIAL)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        chat_template=CHAT,
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="right",
    )


def qwen3_model(kind: type, layers: int = 2) -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
    )
    return kind(config)


def qwen_vl_model() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 272,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=260, video_token_id=261)
    return Qwen2_5_VLForConditionalGeneration(config)


def gemma2_model() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=272,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def qwen3_vl_model() -> Qwen3VLModel:
    text = {
        "vocab_size": 272,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
