"""Attention over adapted projections: fewer matrix products, and none of ETHER's arithmetic at inference.

`enable_ether_attention(model)` puts an `EtherAttnProcessor` on every attention block of a diffusers model that has a
stock processor. While vectors are trained it calls the projections as the stock processor does. At inference it makes
the adapted weights once and keeps them: queries, keys and values of a self-attention then cost one matrix product,
keys and values of a cross-attention one. That takes as much memory as the adapted projections themselves.

Axes: b samples, t positions, h heads.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from ether_diffusion.tuner.base_layer import PLAIN_DTYPES, computes_as_written, intercepted
from ether_diffusion.tuner.layer import EtherLayer

BACKENDS = ("sdpa", "xformers")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
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
        model: a UNet, ControlNet or transformer; blocks with other processors than the stock ones (added keys and
            values, IP-Adapter) are left as they are.
        backend: "sdpa" (PyTorch's scaled_dot_product_attention) or "xformers" (memory_efficient_attention).

    Raises:
        ValueError: unknown backend, or no block with a stock processor (names the processors there are).
        ImportError: xformers is not installed.
    """
    check_backend(backend)
    blocks = [module for module in model.modules() if isinstance(module, Attention)]
    fitting = [block for block in blocks if isinstance(block.processor, (*STOCK, EtherAttnProcessor))]
    if not fitting:
        kinds = ", ".join(sorted({type(block.processor).__name__ for block in blocks})) or "none"
        raise ValueError(f"{type(model).__name__} has no attention with a stock processor; it has: {kinds}")
    disable_ether_attention(model)
    watch = _Watch(model, fitting)
    for block in fitting:
        block.processor = EtherAttnProcessor(backend, replaced=block.processor, watch=watch)


def disable_ether_attention(model: nn.Module) -> None:
    """Put back the processors that `enable_ether_attention` replaced. Nothing stays behind."""
    for block in model.modules():
        if isinstance(block, Attention) and isinstance(block.processor, EtherAttnProcessor):
            if block.processor.watch is not None:
                block.processor.watch.remove()
            block.processor = block.processor.replaced


class EtherAttnProcessor:
    """Attention with ETHER's projections, in place of diffusers' `AttnProcessor2_0` or `XFormersAttnProcessor`.

    Self- and cross-attention, masks, group norm, spatial norm, norms of queries and keys, residual connection and
    output factor as in the stock processors; the same result to rounding.

    Args:
        backend: "sdpa" or "xformers".
        replaced: the processor to put back; default: diffusers' own.
        watch: tells whether vectors were written to since the last call of the model; without one, each call looks.
    """

    def __init__(self, backend: str = "sdpa", *, replaced: Any = None, watch: _Watch | None = None) -> None:
        check_backend(backend)
        self.backend = backend
        self.replaced = AttnProcessor2_0() if replaced is None else replaced
        self.watch = watch
        self._kept: dict[tuple[str, ...], _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are on their own: they leave the kept weights and the watch behind."""
        return self.__dict__ | {"_kept": {}, "watch": None}

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
            query, key, value = self._project(attn, ("to_q", "to_k", "to_v"), hidden_states)
        else:
            if attn.norm_cross:
                encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
            (query,) = self._project(attn, ("to_q",), hidden_states)
            key, value = self._project(attn, ("to_k", "to_v"), encoder_hidden_states)
        query, key, value = (each.unflatten(-1, (attn.heads, -1)) for each in (query, key, value))  # (b, t, h, d)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(key))
        if mask is not None:
            mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])  # (b, h, t or 1, t)
        hidden_states = self._attend(query, key, value, mask, attn.scale).flatten(2).to(query.dtype)

        (hidden_states,) = self._project(attn, ("to_out.0",), hidden_states)
        hidden_states = attn.to_out[1](hidden_states)  # dropout
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """(b, t, h, d) three times to (b, t, h, d)."""
        if self.backend == "sdpa":
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
        from xformers.ops import memory_efficient_attention

        if mask is not None:  # it does not broadcast over queries
            mask = mask.expand(-1, -1, query.shape[1], -1)
        query, key, value = (each.contiguous() for each in (query, key, value))
        return memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)

    def _project(self, attn: Attention, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The named projections of x: by one matrix product with kept weights where nothing in them is trained."""
        layers = [attn.to_out[0] if name == "to_out.0" else getattr(attn, name) for name in names]
        kept = self._kept.get(names)
        if kept is None or not kept.is_current_at_a_glance(layers, x, self.watch):
            if not _can_keep(layers, x):
                self._kept.pop(names, None)
                return tuple(layer(x) for layer in layers)
            if kept is None or not kept.is_current(layers, self.watch):
                kept = self._kept[names] = _Kept.of(layers, self.watch)
        return F.linear(x, kept.weight, kept.bias).split(kept.widths, dim=-1)


def _acts(layer: nn.Module) -> bool:
    """Whether an unmerged adapter changes what the layer answers."""
    return isinstance(layer, EtherLayer) and not layer.merged and bool(layer.acting_adapters)


def _can_keep(layers: list[nn.Module], x: Tensor) -> bool:
    """Whether the layers' adapted weights can take their place: one is adapted, and nothing is trained or hooked."""
    if not any(_acts(layer) for layer in layers):
        return False
    for layer in layers:
        if isinstance(layer, EtherLayer):
            if intercepted(layer):
                return False
            if torch.is_grad_enabled() and any(
                vector.requires_grad for name in layer.acting_adapters for vector in layer.vectors(name).named().values()
            ):
                return False
        base = layer.base_layer if isinstance(layer, EtherLayer) else layer
        if not computes_as_written(base, x):
            return False
    return True


@dataclass(frozen=True)
class _Kept:
    """Adapted weights one above the other, with all that they were made from."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]
    made_from: tuple
    acting: tuple
    written: list[Tensor]  # `_values` of their sources
    generation: int | None

    @classmethod
    @torch.no_grad()
    def of(cls, layers: list[nn.Module], watch: _Watch | None) -> _Kept:
        weights, biases = [], []
        for layer in layers:
            acts = _acts(layer)
            weights.append(layer.adapted_weight(layer.acting_adapters) if acts else layer.weight)
            biases.append(layer.get_base_layer().bias if isinstance(layer, EtherLayer) else layer.bias)
        bias = None
        if any(each is not None for each in biases):
            pairs = zip(biases, weights, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for b, w in pairs])
        return cls(
            torch.cat(weights) if len(weights) > 1 else weights[0].detach().clone(),
            bias,
            [len(weight) for weight in weights],
            tuple(map(_fixed, layers)),
            tuple(map(_acting, layers)),
            _values(_sources(layers)),
            None if watch is None else watch.generation,
        )

    def is_current_at_a_glance(self, layers: list[nn.Module], x: Tensor, watch: _Watch | None) -> bool:
        """Whether these weights are surely current for x, by the watch's look at all layers before this call."""
        return (
            watch is not None
            and watch.looked
            and self.generation == watch.generation
            and self.weight.dtype == x.dtype
            and self.weight.device == x.device
            and not torch.is_grad_enabled()
            and self.acting == tuple(map(_acting, layers))
        )

    def is_current(self, layers: list[nn.Module], watch: _Watch | None) -> bool:
        if self.acting != tuple(map(_acting, layers)) or self.made_from != tuple(map(_fixed, layers)):
            return False
        if watch is not None and watch.looked:
            return self.generation == watch.generation
        with torch.no_grad():
            return _same(self.written, _values(_sources(layers)))


def _acting(layer: nn.Module) -> tuple:
    """The adapters that change what a layer answers, with their strengths, which change within a call of the model."""
    if not isinstance(layer, EtherLayer) or layer.merged:
        return ()
    return tuple((name, layer.scaling[name]) for name in layer.acting_adapters)


def _fixed(layer: nn.Module) -> tuple:
    """What else an adapted weight follows from, and whether it may be kept, apart from what tensors hold."""
    adapted = isinstance(layer, EtherLayer)
    base = layer.get_base_layer() if adapted else layer
    described = [id(layer), id(base), _fixed_of(base.weight), _fixed_of(base.bias)]
    described += [intercepted(each) for each in (layer, base)]
    if adapted:
        described.append(layer.merged)
        described += map(_fixed_of, _vectors(layer))
    return tuple(described)


def _vectors(layer: EtherLayer) -> list[Tensor]:
    """Of every adapter, active or not."""
    return [vector for name in layer.adapter_layer_names for vector in layer._modules[name].values()]


def _fixed_of(tensor: Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    return id(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad


def _sources(layers: list[nn.Module]) -> list[list[Tensor]]:
    """What can be written to without a trace (`.data.copy_`): the vectors, and of each weight the diagonal.

    Views (·,), in groups of one device and dtype, so that each can be compared at once.
    """
    groups: dict[tuple, list[Tensor]] = {}
    for layer in layers:
        views = [layer.weight.detach().diagonal()]
        if isinstance(layer, EtherLayer):
            views += [vector.detach().view(-1) for vector in _vectors(layer)]
        for view in views:
            groups.setdefault((view.device, view.dtype), []).append(view)
    return list(groups.values())


def _values(sources: list[list[Tensor]]) -> list[Tensor]:
    """What the sources hold now: one tensor for each group."""
    return [torch.cat(views) for views in sources]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _readable(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in PLAIN_DTYPES and not weight.is_meta


class _Watch:
    """Looks once per call of a model whether any adapted projection was written to without a trace.

    Not while it trains: nothing is kept then, or each processor looks for itself.
    """

    def __init__(self, model: nn.Module, blocks: list[Attention]) -> None:
        self.generation, self.looked = 0, False
        self._blocks = blocks
        self._fixed: list[tuple] = []  # of the adapted projections, at the last look
        self._sources: list[list[Tensor]] = []
        self._seen: list[Tensor] = []  # what the sources held then
        self._handles = [
            model.register_forward_pre_hook(self._look),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    @torch.no_grad()
    def _look(self, model: nn.Module, _: tuple) -> None:
        if model.training:
            return
        layers = self._layers()
        fixed = [_fixed(layer) for layer in layers]
        if fixed != self._fixed:  # the sources are other tensors now
            self._fixed, self._sources, self._seen = fixed, _sources(layers), []
        if not _same(self._seen, now := _values(self._sources)):
            self.generation, self._seen = self.generation + 1, now
        self.looked = True

    def _layers(self) -> list[nn.Module]:
        """The projections whose weights can be read here; nothing is kept of the others."""
        layers = [block.get_submodule(name) for block in self._blocks for name in PROJECTIONS]
        return [each for each in layers if _readable(each.weight)]

    def _leave(self, *_: Any) -> None:
        self.looked = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
