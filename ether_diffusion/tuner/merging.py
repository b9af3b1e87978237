"""The adapted weight in the place of the base layer's own, and the way back to the very bits that lay there.

Taking away what was added, as LoRA does, would leave rounding behind: the old weight is kept instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from ether_diffusion.tuner.base_layer import is_plain, put_values
from ether_diffusion.tuner.operators import adapted_weight
from ether_diffusion.tuner.transforms import Adaptation, low_rank_delta


class MergingLayer(BaseTunerLayer):
    """The part of an adapted layer that computes adapted weights, and merges and unmerges them.

    `EtherLayer` adds the vectors, their strengths (`scaling`) and the forward pass without merging.
    """

    def _start_unmerged(self) -> None:
        """The state of a layer into which nothing is merged."""
        self.merged_adapters: list[str] = []
        self.merged_adaptations: dict[str, Adaptation] = {}  # as they were when merged
        self.original_weight: Tensor | Callable[[], Tensor] | None = None  # while merged, or what brings it
        self._written: int | None = None  # `_checksum` of the weight as it was merged, where it is nothing but that

    def adapted_weight(self, adapter_names: list[str]) -> Tensor:
        """The base weight as it is unmerged, under the named adapters, one after the other, at their present strength.

        Shape and dtype of the weight; rounded once, at the end.
        """
        return self._adapted([self._adaptation(name) for name in self._own(adapter_names)])

    def _adaptation(self, adapter_name: str) -> Adaptation:
        """What an adapter does now to the weight: copies, on the device of the unmerged weight."""
        device = self.plain_weight().device
        vectors = self.vectors(adapter_name).map(lambda vector: vector.to(device, copy=True))
        return Adaptation(vectors, self.scaling[adapter_name])

    def _adapted(self, adaptations: Iterable[Adaptation]) -> Tensor:
        base = self.plain_weight()
        accurate = base if base.dtype == torch.float64 else base.float()
        for adaptation in adaptations:
            accurate = adapted_weight(accurate, *adaptation)
        return base if accurate is base else accurate.to(base.dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W(α) − W of one adapter alone on the base weight, in the shape of the weight; float32 (float64)."""
        base = self.plain_weight()
        down, up = self.low_rank_delta(adapter_name)
        return (up @ down).view(base.shape)

    def low_rank_delta(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Factors (A, B) of `get_delta_weight`, flattened to (o, i·k): see `transforms.low_rank_delta`."""
        return low_rank_delta(self.plain_weight(), *self._adaptation(adapter_name))

    def unmerged_weight(self) -> Tensor:
        """The weight below as it is without ETHER: the layer's own, or while merged the kept one."""
        if self.original_weight is None:
            return self.weight.data
        return self.original_weight() if callable(self.original_weight) else self.original_weight

    def plain_weight(self) -> Tensor:
        """`unmerged_weight`, where it can be read and written as it is.

        Raises:
            ValueError: the weight is quantised, or elsewhere (on the meta device).
        """
        weight = self.unmerged_weight()
        if not is_plain(weight):
            raise ValueError(
                f"the weight of {type(self.get_base_layer()).__name__} is no plain floating-point tensor here "
                f"({type(weight).__name__} of {weight.dtype} on {weight.device}): ETHER runs over such a layer, but "
                "merging and export need a base model that is neither quantised nor offloaded"
            )
        return weight

    @torch.inference_mode(False)  # what is made in it could not be computed with outside
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight into the base layer; keeps the old weight, so that `unmerge` is exact.

        Costs one more copy of the weight while merged. A LoRA over this layer has to be merged after it: merged
        before, it becomes a part of what is reflected.

        Args:
            safe_merge: check the result for NaN and infinity before anything changes.
            adapter_names: default: the active ones.

        Raises:
            ValueError: the result is not finite (`safe_merge`), the weight is quantised or offloaded, or another
                method's adapter lies between this one and the weight and is not merged.
        """
        names = self._own(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        inner = self.base_layer
        if isinstance(inner, BaseTunerLayer) and not inner.merged and inner._get_available_adapters():
            raise ValueError(
                f"a {type(inner).__name__} with unmerged adapters lies below this ETHER layer: merging into the "
                "weight would drop it; merge or delete it first"
            )
        weight, original = self.get_base_layer().weight, self.plain_weight()
        adaptations = self.merged_adaptations | {name: self._adaptation(name) for name in names}
        merged = self._adapted(adaptations.values()).to(weight.device, weight.dtype)
        added = self._added_since_merging() if self.merged else None
        if added is not None:
            merged = (merged + added).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaN or infinity in the merged weight: adapter {', '.join(names)} seems to be broken")
        self.original_weight = original if self.original_weight is None else self.original_weight
        self.merged_adaptations = adaptations
        # Its own tensor, even if nothing was adapted: what is written to the weight must not reach the original.
        values = _laid_out_as(weight, merged) if merged is not original else merged.clone()
        put_values(self.get_base_layer(), "weight", values)
        self._written = _checksum(values) if added is None else None
        self.merged_adapters.extend(names)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight back as it was before the first merge, bit for bit.

        What another method has merged into the weight since, a LoRA over this layer, stays in it (to rounding).
        """
        if not self.merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)
            return
        put_values(self.get_base_layer(), "weight", self._weight_without_merged())
        self._start_unmerged()

    def _weight_without_merged(self) -> Tensor:
        weight = self.get_base_layer().weight
        original, added = self.unmerged_weight().to(weight.device, weight.dtype), self._added_since_merging()
        return _laid_out_as(weight, original if added is None else (original + added).to(weight.dtype))

    def _added_since_merging(self) -> Tensor | None:
        """What the weight has besides that which `merge` wrote, if anything; float32 (float64)."""
        weight = self.get_base_layer().weight.data
        if _checksum(weight) == self._written:
            return None
        written = self._adapted(self.merged_adaptations.values()).to(weight.device, weight.dtype)
        # What is not finite says nothing of what was added to it.
        same = (weight == written) | ~torch.isfinite(written)
        if same.all():
            return None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.where(same, 0, weight.to(dtype) - written.to(dtype))

    def _merged_output(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What a merged layer answers: the base layer's output, if adapters are disabled with the weight as it was."""
        if self.disable_adapters:
            weight = self._weight_without_merged()
            return torch.func.functional_call(self.get_base_layer(), {"weight": weight}, (x, *args), kwargs)
        self._refuse_adapters_below()
        return self.base_layer(x, *args, **kwargs)

    def _refuse_adapters_below(self) -> None:
        """Merged, this layer cannot act on what an unmerged adapter below it, activated since, adds to the weight."""
        inner = self.base_layer
        if isinstance(inner, BaseTunerLayer) and not inner.merged and not inner.disable_adapters:
            if acting := set(inner.active_adapters) & set(inner._get_available_adapters()):
                raise ValueError(
                    f"{', '.join(sorted(acting))}, loaded before the ETHER adapter that is fused, has become active "
                    "since, and fused ETHER cannot reflect it: call unfuse_ether first"
                )


def check_unmergeable(layer: BaseTunerLayer) -> None:
    """Make sure that `unmerge` can put the original weight of a layer back, whatever method the layer is of.

    Raises:
        ValueError: the layer has been offloaded since, or the file with the original is gone or has changed.
    """
    if layer.get_base_layer().weight.is_meta:
        raise ValueError(
            "a layer that was fused has been offloaded since, so its weight cannot be put back: end the "
            "offloading first (remove_all_hooks, accelerate.hooks.remove_hook_from_module)"
        )
    if isinstance(layer, MergingLayer):
        layer.unmerged_weight()


def _laid_out_as(weight: Tensor, values: Tensor) -> Tensor:
    """The values in the memory format of a weight: in another one (channels_last), convolutions would be slow."""
    return values if values.stride() == weight.stride() else torch.empty_like(weight.data).copy_(values)


def _checksum(weight: Tensor) -> int:
    """The sum of the bits of a tensor, read as integers.

    It tells whether a weight is still the merged one in a single pass; to make that again and compare takes many.
    """
    flat = weight.contiguous().view(-1)
    return int(flat.view(torch.int64 if weight.nbytes % 8 == 0 else torch.uint8).sum())
