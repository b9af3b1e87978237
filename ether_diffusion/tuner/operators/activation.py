"""The activation side: what a transform adds to the input or output of a layer, whatever that layer is.

Axes: N rows of x, d channels that are transformed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ether_diffusion.tuner.transforms import (
    Transform,
    accurate_dtype,
    gather,
    normalize_backward,
    project,
    unit_and_length,
)


def displacement(x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """(T − I)x on the last axis, T the ETHER transform of `u`, or the ETHER+ transform of `u` and `v`.

    ETHER: −2(x·û)û per block. ETHER+: (x·v̂)v̂ − (x·û)û per block.
    x: (..., d); u, v: (n, d/n). Returns (..., d) in float32 (float64 where x or u is), also under autocast. For the
    backward pass it keeps x and the raw vectors alone.
    """
    return _Displacement.apply(x, u, v)


class _Displacement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, u, v)
        with torch.autocast(x.device.type, enabled=False):
            transform = Transform.of(u, v, accurate_dtype(x.dtype))
            return transform.displace(x.to(transform.units[0].dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            transform = Transform.of(u, v, g.dtype)
            # T is symmetric, so that the gradient of x is displaced as x is.
            gx = transform.displace(g).to(x.dtype) if ctx.needs_input_grad[0] else None
            grads: list[Tensor | None] = [None, None]
            x, g = (a.to(g.dtype).reshape(-1, a.shape[-1]) for a in (x, g))  # (N, d)
            for k, raw in enumerate((u, v)):
                if ctx.needs_input_grad[1 + k]:
                    unit, length = unit_and_length(raw)
                    along = gather(x, project(g, unit), len(raw)) + gather(g, project(x, unit), len(raw))
                    grads[k] = normalize_backward(unit, length, transform.factors[k] * along).to(raw.dtype)
        return gx, *grads
