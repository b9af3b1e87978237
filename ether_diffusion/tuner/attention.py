"""One attention processor for adapted blocks, with a choice of what computes the attention.

`enable_ether_attention(model)` puts an `EtherAttnProcessor` on every attention block of a diffusers model that has a
stock processor. It calls the projections as layers and keeps nothing of them between calls, so whatever happens to
adapters, strengths or weights applies at once. Inference without the cost of a reflection is what `fuse_ether` is for.

Axes: b samples, t positions, h heads, d channels of a head.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from ether_diffusion.tuner.guards import projects_at_once

BACKENDS = ("sdpa", "xformers")
STOCK = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)


def check_backend(backend: str) -> None:
    """Raise unless the backend is known (ValueError) and installed (ImportError)."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: there are {', '.join(BACKENDS)}")
    if backend == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ImportError("attention backend xformers: it is not installed; pip install 'ether-diffusion[xformers]'")


def enable_ether_attention(model: nn.Module, backend: str = "sdpa") -> None:
    """Put `EtherAttnProcessor` on the attention blocks of a diffusers model. Calling it again changes the backend.

    Args:
        model: a UNet or ControlNet; blocks with other processors than the stock ones (added keys and values,
            IP-Adapter) are left as they are. The transformers with flow matching (FLUX, SD3, Qwen-Image, Z-Image and
            their like) have none but such, and need nothing: their own processors call the projections as layers, too.
        backend: "sdpa" (PyTorch's scaled_dot_product_attention) or "xformers" (memory_efficient_attention).

    Raises:
        ValueError: unknown backend, a pipeline in place of a model, projections that are fused into one, or no block
            with a stock processor (names the processors there are).
        ImportError: xformers is not installed.
    """
    check_backend(backend)
    _check_model("enable_ether_attention", model)
    blocks = [module for module in model.modules() if isinstance(module, Attention)]
    if any(projects_at_once(block) for block in blocks):
        raise ValueError(
            f"enable_ether_attention: the projections of this {type(model).__name__} are fused into one: call "
            "unfuse_qkv_projections first"
        )
    fitting = [block for block in blocks if isinstance(block.processor, (*STOCK, EtherAttnProcessor))]
    if not fitting:
        own = {type(module.processor).__name__ for module in model.modules() if hasattr(module, "processor")}
        raise ValueError(
            f"{type(model).__name__} has no attention with a stock processor, which is all that EtherAttnProcessor "
            f"replaces (it has: {', '.join(sorted(own)) or 'none'}): leave it out, adapters work without it, and "
            "fuse_ether is the way to full speed"
        )
    disable_ether_attention(model)  # so that an EtherAttnProcessor never replaces another
    for block in fitting:
        block.processor = EtherAttnProcessor(backend, replaced=block.processor)


def disable_ether_attention(model: nn.Module) -> None:
    """Put back the processors that `enable_ether_attention` replaced. Nothing stays behind.

    Raises:
        ValueError: a pipeline in place of a model.
    """
    _check_model("disable_ether_attention", model)
    for block in model.modules():
        if isinstance(block, Attention) and isinstance(block.processor, EtherAttnProcessor):
            block.processor = block.processor.replaced
        # While projections are fused, the processors from before wait here, to be put back.
        waiting = block.__dict__.get("original_attn_processors") or {}
        waiting.update({k: p.replaced for k, p in waiting.items() if isinstance(p, EtherAttnProcessor)})


def _check_model(call: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        denoiser = next((f"pipe.{name}" for name in ("unet", "transformer") if hasattr(model, name)), "pipe.unet")
        raise ValueError(f"{call}: got a {type(model).__name__}, needs one of a pipeline's models: {call}({denoiser})")


class EtherAttnProcessor:
    """Attention over adapted projections, in place of diffusers' `AttnProcessor2_0` or `XFormersAttnProcessor`.

    Self- and cross-attention, masks, group norm, spatial norm, norms of queries and keys, residual connection and
    output factor as in the stock processors; the same result to rounding.

    Its `__class__` is that of the processor in whose place it stands, as a proxy's is: diffusers compares it with
    those that it knows (`set_default_attn_processor`). `type` and `isinstance` tell the two apart.

    Args:
        backend: "sdpa" or "xformers".
        replaced: the processor to put back; default: diffusers' own.

    Raises:
        ValueError, ImportError: as `check_backend`.
    """

    def __init__(self, backend: str = "sdpa", *, replaced: Any = None) -> None:
        check_backend(backend)
        self.backend = backend
        self.replaced = AttnProcessor2_0() if replaced is None else replaced

    @property
    def __class__(self) -> type:
        return type(self.replaced)

    def __reduce__(self) -> tuple:
        return EtherAttnProcessor.__new__, (EtherAttnProcessor,), vars(self)  # pickle would go by `__class__`

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (b, t, channels)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        projected = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (each.unflatten(-1, (attn.heads, -1)) for each in projected)  # (b, t, h, d)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(key))
        if mask is not None:
            mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])  # (b, h, t or 1, t)
        hidden_states = self._attend(query, key, value, mask, attn.scale).flatten(2).to(query.dtype)

        projection, dropout = attn.to_out
        hidden_states = dropout(projection(hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """(b, t, h, d) three times to (b, t, h, d)."""
        if self.backend == "sdpa":
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            # Stock sdpa leaves `scale` out; without it, a block with scale_qk=False would be scaled all the same.
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
        from xformers.ops import memory_efficient_attention  # an optional extra

        if mask is not None:  # it does not broadcast over queries
            mask = mask.expand(-1, -1, query.shape[1], -1)
        query, key, value = (each.contiguous() for each in (query, key, value))
        return memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)
