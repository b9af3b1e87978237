"""What an adapted layer needs to know of the layer below it: plain, quantised, offloaded or hooked."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Weights that can be read and written as they are."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight can be read and written as it is: not quantised, not sharded, not elsewhere (on meta)."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in PLAIN_DTYPES and not weight.is_meta


def put_values(module: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter or buffer of a module other values: another tensor, so that the old one can be kept.

    One that was made in inference mode is itself exchanged: it has no version that could follow new data.
    """
    old = getattr(module, name)
    if not old.is_inference():
        old.data = values
    elif isinstance(old, nn.Parameter):
        module._parameters[name] = nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[name] = values


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook by which Accelerate keeps a module's parameters elsewhere between calls, if one does."""
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", [hook]) if isinstance(h, AlignDevicesHook) and h.offload), None)


def intercepted(module: nn.Module) -> bool:
    """Whether something happens in a call of the module besides its own forward."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in HOOKS)


def computes_as_written(base: nn.Module, x: Tensor) -> bool:
    """Whether `base(x)` is nothing but torch.nn.functional.linear of x and a frozen, plain weight.

    Else the layer has to be called, because something happens in the call: hooks (offloading, layerwise casting, a
    profiler), quantised or sharded weights, another adapter, a weight that is trained.
    """
    if type(base) is not nn.Linear or intercepted(base):
        return False
    weight = base.weight
    return (
        is_plain(weight)
        and not weight.requires_grad
        and weight.device == x.device
        and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
    )
