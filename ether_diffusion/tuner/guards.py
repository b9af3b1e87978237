"""Diffusers' methods of models that would lose an adapter without a word: an error on models that carry ETHER.

A pipeline's methods are there before any adapter is; a model's are of dozens of classes, which diffusers imports when
they are asked for. So a class gets its guards with the first adapter on one of its models. They hold no state: models
without ETHER, copies and models whose adapters PEFT took off find the stock methods.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

from diffusers import ModelMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from ether_diffusion.tuner.layer import EtherLayer

PROJECTION = re.compile(r"(to|add)_[qkv](_proj)?")
"""Layers of an attention that `fuse_qkv_projections` makes one of."""
FUSED_PROJECTION = re.compile(r"to_(added_)?(qkv|kv)")
"""What it makes of them."""


def projects_at_once(attention: nn.Module | None) -> bool:
    """Whether queries, keys and values come from one fused projection, past the three layers."""
    if isinstance(attention, Attention):  # whose flag stays when its projections are unfused
        return type(attention.processor).__name__.startswith("Fused")
    return bool(getattr(attention, "fused_projections", False))


def projections(model: nn.Module, kind: re.Pattern[str]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Path, layer and attention of every projection of a kind, where the model's fusing would exchange it."""
    home = _home(model, "fuse_qkv_projections")
    fusing = AttentionModuleMixin if home is AttentionMixin else Attention  # the one that it looks for
    for path, attention in model.named_modules() if home is not None else ():
        if isinstance(attention, fusing) and getattr(attention, "_supports_qkv_fusion", True):
            for name, layer in attention.named_children():
                if kind.fullmatch(name):
                    yield f"{path}.{name}", layer, attention


def _home(model: nn.Module, method: str) -> type | None:
    """The class that a model has a method from."""
    return next((kind for kind in type(model).__mro__ if method in vars(kind)), None)


def adapters_within(*layers: nn.Module) -> list[str]:
    """The names of the ETHER adapters on layers, or on what they are made of."""
    found = [layer for outer in layers for layer in outer.modules() if isinstance(layer, EtherLayer)]
    return list(dict.fromkeys(name for layer in found for name in layer.ether_u))


def check_projections(model: nn.Module) -> None:
    """Refuse to make one projection of those that carry ETHER, or another in the place of one that carries it.

    Raises:
        ValueError: names the adapters, and what to do.
    """
    both = re.compile(f"{PROJECTION.pattern}|{FUSED_PROJECTION.pattern}")
    if names := adapters_within(*(layer for _, layer, _ in projections(model, both))):
        raise ValueError(
            f"fuse_qkv_projections: {', '.join(names)} would be lost without a word; merge adapters, or delete them "
            "first"
        )


def check_unfusing(model: nn.Module) -> None:
    """Refuse to take off a fused projection that carries ETHER itself.

    Raises:
        ValueError: names the adapters, and what to do.
    """
    if names := adapters_within(*(layer for _, layer, _ in projections(model, FUSED_PROJECTION))):
        raise ValueError(
            f"unfuse_qkv_projections: {', '.join(names)} would be lost without a word; delete adapters first"
        )


def check_separate(model: nn.Module, targeted: Callable[[str], bool]) -> None:
    """Refuse an adapter on layers that nothing calls, because one fused projection stands for them.

    targeted: whether the adapter is for the layer of this path.

    Raises:
        ValueError: names the layer, and what to call.
    """
    for path, _, attention in projections(model, PROJECTION):
        if projects_at_once(attention) and targeted(path):
            raise ValueError(f"{path} is fused with others into one projection: call unfuse_qkv_projections first")


def check_plain(model: nn.Module) -> None:
    """Refuse to write a model whose layers are wrapped: the file would not open.

    Raises:
        ValueError: names the adapters, and what writes them.
    """
    layers = [module for module in model.modules() if isinstance(module, EtherLayer)]
    if layers:
        names = ", ".join(adapters_within(*layers)) or "ETHER's empty layers"
        raise ValueError(
            f"save_pretrained: {names} cannot be written into a model's folder: save_ether_weights writes the adapter "
            "alone, ether_diffusion.export.merge_adapters the pipeline with it merged"
        )


CHECKS: dict[str, Callable[[nn.Module], None]] = {
    "fuse_qkv_projections": check_projections,
    "unfuse_qkv_projections": check_unfusing,
    "save_pretrained": check_plain,
}


def guard(model: nn.Module) -> None:
    """Let the class of a model of diffusers check its models before the methods above. Twice is once.

    Models of transformers need none: their `save_pretrained` writes the adapter alone, as `load_adapter` reads it.
    """
    for name, check in CHECKS.items() if isinstance(model, ModelMixin) else ():
        home = _home(model, name)
        if home is not None and not hasattr(vars(home)[name], "checked_by"):
            setattr(home, name, _checked(vars(home)[name], check))


def _checked(method: Callable, check: Callable[[nn.Module], None]) -> Callable:
    @functools.wraps(method)
    def checked(self: nn.Module, *args, **kwargs):
        check(self)
        return method(self, *args, **kwargs)

    checked.checked_by = check
    return checked
