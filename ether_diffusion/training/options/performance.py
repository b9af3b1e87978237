"""Speed and memory of a training."""

from dataclasses import dataclass

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import OptionGroup, option
from ether_diffusion.tuner.attention import BACKENDS, check_backend


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions(OptionGroup):
    """speed and memory"""

    mixed_precision: str | None = option(
        "Precision of the frozen weights and of the arithmetic; what is trained stays in float32. Default: as "
        "`accelerate launch` was told, else no.",
        None,
        choices=tuple(PRECISIONS),
    )
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass: less memory, slower.", False, free=True
    )
    cache_latents: bool = option(
        "Encode every image (and its mirror image, with --random_flip) once before the training, each repeat with "
        "one crop, and take the autoencoder off the device.",
        False,
    )
    pre_compute_text_embeddings: bool = option(
        "Encode every prompt once before the training and take the text encoders off the device.",
        False,
        free=True,
    )
    offload: bool = option(
        "Keep what is not trained, but for the denoiser, in the CPU's memory whenever it is not at work.",
        False,
        free=True,
    )
    attention_backend: str | None = option(
        "What computes the denoiser's attention, through EtherAttnProcessor. Default: diffusers' own processor.",
        None,
        choices=BACKENDS,
    )
    enable_xformers_memory_efficient_attention: bool = option("The same as --attention_backend xformers.", False)
    quantize: str | None = option(
        "Keep the denoiser's frozen weights in fewer bits: nf4 (bitsandbytes, on a GPU), int8 (torchao), fp8.",
        None,
        choices=("nf4", "int8", "fp8"),
    )
    vae_tiling: bool = option(
        "Decode sample images in tiles: less memory, and at their seams a little other.", False, free=True
    )
    allow_tf32: bool = option("TensorFloat-32 for float32 products on Nvidia GPUs from Ampere on.", False)
    compile: bool = option("torch.compile for the denoiser's repeated blocks; the first step takes long.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        backend = self.attention
        if self.enable_xformers_memory_efficient_attention and backend != "xformers":
            raise InputError(
                f"--attention_backend {backend}: contradicts --enable_xformers_memory_efficient_attention; drop one"
            )
        if backend is not None:
            try:
                check_backend(backend)
            except ImportError as error:
                raise InputError(f"--attention_backend xformers: {error}") from error

    @property
    def attention(self) -> str | None:
        """The attention backend asked for by either flag."""
        if self.attention_backend is None and self.enable_xformers_memory_efficient_attention:
            return "xformers"
        return self.attention_backend
