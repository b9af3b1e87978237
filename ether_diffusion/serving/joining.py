"""Which calls of a model can be one forward, how their arguments are joined by row, and how the output is split.

Rows are entries of the first axis: one for each image, two with classifier-free guidance. Only arguments listed here
are joined by row; all others must be equal, and a model that is not listed is called alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

TIMESTEPS = ("timestep", "t")
"""Arguments that a model also takes as one number for all rows."""
BY_ROW: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "added_cond_kwargs",
        "encoder_attention_mask",
    ),
    "SD3Transformer2DModel": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    "FluxTransformer2DModel": ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"),
    "Flux2Transformer2DModel": ("hidden_states", "encoder_hidden_states", "timestep", "guidance"),
    "ChromaTransformer2DModel": ("hidden_states", "encoder_hidden_states", "timestep", "attention_mask"),
    "QwenImageTransformer2DModel": (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "guidance",
    ),
    "Krea2Transformer2DModel": ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
    "SanaTransformer2DModel": (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "guidance",
        "encoder_attention_mask",
    ),
    "Lumina2Transformer2DModel": ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
    "ZImageTransformer2DModel": ("x", "t", "cap_feats"),
    "CLIPTextModel": ("input_ids", "attention_mask", "position_ids"),
    "CLIPTextModelWithProjection": ("input_ids", "attention_mask", "position_ids"),
    "T5EncoderModel": ("input_ids", "attention_mask"),
}
"""By the name of a model's class: arguments with a row for each image, the first of which counts the rows."""
ANY_LENGTH = ("cap_feats",)
"""Lists of tensors that the model itself brings to one length."""

_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""A pipeline passes the same tensors at every step: each is read once."""


class NotJoinable(Exception):
    """These calls, or this output, cannot be joined by row: the calls are made one by one."""


def uncompiled(model: Any) -> Any:
    """The model within a compiled one."""
    return getattr(model, "_orig_mod", model)


def kind_of(model: Any) -> str:
    """The name of a model's class, by which `BY_ROW` has it."""
    return type(uncompiled(model)).__name__


def count_rows(call: BoundArguments) -> int:
    """The rows of a call: the length of its first argument that is a tensor or a list of tensors; else 0."""
    for value in call.arguments.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return 0


def invoke(model: Callable, call: BoundArguments) -> Any:
    """Call a model with these arguments, by their names: decorators of diffusers look for some of them there."""
    arguments = dict(call.arguments)
    for name, parameter in call.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return model(**arguments)


def key_of(kind: str, call: BoundArguments) -> Hashable | None:
    """What calls must have in common to be one forward; None for a call that has to be alone."""
    if kind not in BY_ROW:
        return None
    rows = count_rows(call)
    try:
        return tuple(
            (name, _row_key(name, value, rows) if name in BY_ROW[kind] else frozen(value))
            for name, value in call.arguments.items()
        )
    except NotJoinable:
        return None


def _row_key(name: str, value: Any, rows: int) -> Hashable:
    if value is None:
        return None
    if name in TIMESTEPS:  # a number, or one for each row; integers and floats of several schedulers meet
        return ()
    if isinstance(value, Mapping):
        return tuple(sorted((key, _row_key(key, part, rows)) for key, part in value.items()))
    if isinstance(value, list) and len(value) == rows and all(isinstance(part, Tensor) for part in value):
        return frozenset(_form(part.shape[1:] if name in ANY_LENGTH else part.shape, part) for part in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return _form(value.shape[1:], value)
    raise NotJoinable(f"{name} has no row for each image")


def _form(shape: Sequence[int], tensor: Tensor) -> Hashable:
    return (tuple(shape), tensor.dtype, str(tensor.device))


def frozen(value: Any) -> Hashable:
    """A key that is equal for equal values; objects that are no data are equal to themselves alone."""
    if isinstance(value, Tensor):
        return (_form(value.shape, value), _digest(value))
    if isinstance(value, Mapping):
        return tuple((key, frozen(part)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(frozen(part) for part in value))
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return (type(value).__name__, value)
    return id(value)


def _digest(tensor: Tensor) -> bytes:
    known = _digests.get(tensor)
    version = -1 if tensor.is_inference() else tensor._version  # those of inference mode count none
    if known is None or known[0] != version or version < 0:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        known = _digests[tensor] = (version, hashlib.sha256(data.tobytes()).digest())
    return known[1]


def join(kind: str, calls: Sequence[BoundArguments]) -> BoundArguments:
    """One call with the rows of all, in their order; they have the same key."""
    if len(calls) == 1:
        return calls[0]
    joined = BoundArguments(calls[0].signature, type(calls[0].arguments)(calls[0].arguments))
    counts = [count_rows(call) for call in calls]
    device = _device_of(calls[0])
    for name in BY_ROW[kind]:
        values = [call.arguments[name] for call in calls if name in call.arguments]
        if not values or values[0] is None:
            continue
        if name in TIMESTEPS:
            values = [_for_each_row(value, rows, device) for value, rows in zip(values, counts, strict=True)]
        joined.arguments[name] = _concatenate(values)
    return joined


def _device_of(call: BoundArguments) -> torch.device:
    first = next(iter(call.arguments.values()))
    return (first[0] if isinstance(first, list) else first).device


def _for_each_row(timestep: Any, rows: int, device: torch.device) -> Tensor:
    """A timestep for each row. (rows,)"""
    timestep = torch.as_tensor(timestep, device=device)
    if timestep.ndim > 1 or timestep.numel() not in (1, rows):
        raise NotJoinable(f"a timestep of shape {tuple(timestep.shape)} for {rows} rows")
    return timestep.reshape(-1).expand(rows)


def _concatenate(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, list):
        return [part for value in values for part in value]
    if isinstance(first, Mapping):
        return {key: _concatenate([value[key] for value in values]) for key in first}
    return torch.cat(list(values))  # whole timesteps beside fractional ones become fractional


def split(output: Any, counts: Sequence[int]) -> list[Any]:
    """The output of each call from the joint one, for calls of so many rows.

    Raises:
        NotJoinable: an output in which the rows cannot be told.
    """
    if len(counts) == 1:
        return [output]
    total = sum(counts)
    if output is None:
        return [None] * len(counts)
    if isinstance(output, Tensor) and output.ndim and len(output) == total:
        return list(output.split(list(counts)))
    if isinstance(output, Mapping):  # the outputs of diffusers and transformers are mappings
        parts = {key: split(value, counts) for key, value in output.items()}
        return [type(output)(**{key: part[k] for key, part in parts.items()}) for k in range(len(counts))]
    if isinstance(output, list) and len(output) == total:
        ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        return [output[end - rows : end] for end, rows in zip(ends, counts, strict=True)]
    if isinstance(output, tuple):
        parts = [split(value, counts) for value in output]
        return [tuple(part[k] for part in parts) for k in range(len(counts))]
    raise NotJoinable(f"the rows of an output cannot be told: {type(output).__name__}")


def repeat(kind: str, call: BoundArguments, rows: int) -> BoundArguments:
    """The call's first row, as often as this."""
    one = BoundArguments(call.signature, type(call.arguments)(call.arguments))
    total = count_rows(call)
    for name in BY_ROW[kind]:
        if (value := call.arguments.get(name)) is not None:
            one.arguments[name] = _first_row(value, total, is_timestep=name in TIMESTEPS)
    return join(kind, [one] * rows)


def _first_row(value: Any, total: int, *, is_timestep: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _first_row(part, total, is_timestep=False) for key, part in value.items()}
    if is_timestep and not (isinstance(value, Tensor) and value.ndim and len(value) == total):
        return value
    return value[:1]
