"""Batches of mixed adapters, as PEFT has them: `adapter_names` says which adapter each row has.

Each row has its adapter alone, whichever are active. "__base__" is none, as is an adapter that a layer does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from ether_diffusion.tuner.layer import EtherLayer

BASE = "__base__"
"""PEFT's name for a row without an adapter."""
Arguments = Mapping[str, Sequence]
"""`adapter_names` and, of ETHER's layers, `adapter_strengths`: one for each row."""


def mixed_output(
    layer: EtherLayer,
    x: Tensor,
    args: tuple,
    *,
    adapter_names: Sequence[str],
    adapter_strengths: Sequence[float] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A layer's output where each row of x, an entry of its first axis, has an adapter of its own.

    The rows of one adapter are computed as one batch, over any base layer.

    adapter_strengths: of each row; default: the strength that the layer has its adapter at.

    Raises:
        ValueError: not one name for each row, or a layer with merged adapters.
    """
    rows = 0 if x.ndim < 1 - layer.channel_axis else len(x)
    if rows != len(adapter_names):
        raise ValueError(f"adapter_names: {len(adapter_names)} names for a batch of {rows or 'no'} rows")
    if layer.merged:
        raise ValueError(f"adapter_names: {', '.join(layer.merged_adapters)} is merged: unmerge it first")
    if adapter_strengths is None:
        adapter_strengths = [layer.scaling.get(name, 0.0) for name in adapter_names]
    groups: dict[tuple[str, float], list[int]] = {}
    for row, group in enumerate(zip(adapter_names, adapter_strengths, strict=True)):
        groups.setdefault(group, []).append(row)
    parts, order = [], [row for own in groups.values() for row in own]
    for (name, strength), own in groups.items():
        acts = name in layer.ether_u and strength != 0 and not layer.disable_adapters
        below = kwargs | _arguments_below(layer.base_layer, name, strength, len(own))
        part = x if len(groups) == 1 else x[torch.tensor(own, device=x.device)]
        parts.append(layer._adapted_output(part, [(name, strength)] if acts else [], args, below))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]


def _arguments_below(base: nn.Module, name: str, strength: float, rows: int) -> dict[str, Sequence]:
    """What an adapted layer below has to be told of rows that share an adapter."""
    if not isinstance(base, BaseTunerLayer):
        return {}
    return arguments_of(base, [name] * rows, [strength] * rows)


def arguments_of(layer: nn.Module, names: Sequence[str], strengths: Sequence[float] | None) -> dict[str, Sequence]:
    """What a layer takes of names and strengths: those of other methods have a strength for each adapter alone."""
    from_row = {} if strengths is None or not hasattr(layer, "ether_u") else {"adapter_strengths": list(strengths)}
    return {"adapter_names": list(names), **from_row}


def mixing_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that take `adapter_names`: ETHER's and LoRA's, and what PEFT keeps copies of.

    Raises:
        ValueError: another method's layer, which would have its active adapter in all rows; names it.
    """
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) or hasattr(module, "ether_u") or isinstance(module, LoraLayer):
            layers.append(module)
        elif isinstance(module, BaseTunerLayer):
            raise ValueError(f"{path} is a {type(module).__name__}: only ETHER and LoRA mix adapters within a batch")
    return layers


@contextmanager
def arguments_by_layer(
    layers: Sequence[nn.Module], arguments: Callable[[nn.Module, int], Arguments]
) -> Iterator[None]:
    """Within, these layers are called with more arguments, which depend on the rows of their input.

    arguments: of a layer and a number of rows; those that a call has already stay.
    """

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("adapter_names") is not None:  # the layer above has told it
            return args, kwargs
        x = args[0] if args else next(iter(kwargs.values()))
        return args, kwargs | arguments(layer, len(x))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def adapters_by_row(model: nn.Module, adapter_names: Sequence[str], *, beams: int = 1) -> Iterator[None]:
    """Within, row i of the model's inputs has the adapter adapter_names[i].

    beams: by which a beam search multiplies the rows, except those that an encoder reads.

    Raises:
        ValueError: what is no list of names, or a name that no layer has. In a call: another number of rows.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names={adapter_names!r}: a list with a name for each row fits")
    layers = mixing_layers(model)
    known = {name for layer in layers if isinstance(layer, BaseTunerLayer) for name in layer._get_available_adapters()}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise ValueError(
            f"adapter_names: there is no adapter {', '.join(unknown)}; there are {', '.join(sorted(known))} and {BASE}"
        )
    of_beams = [name for name in adapter_names for _ in range(beams)]

    def arguments(layer: nn.Module, rows: int) -> Arguments:
        return {"adapter_names": list(adapter_names) if rows == len(adapter_names) else of_beams}

    with arguments_by_layer(layers, arguments):
        yield
