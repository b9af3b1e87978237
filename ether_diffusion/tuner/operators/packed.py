"""The vectors of a layer, one block each, as rows of one tensor.

Small layers wait for the number of operations. With all vectors in one tensor, their norms are one operation and so
is the gradient of the norms; signs are rows of their own, so that no product has to be scaled afterwards.

Axes: m vectors of a side, i inputs, o outputs, w the width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ether_diffusion.tuner.transforms import Vectors, accurate_dtype

FLOOR = 1e-12
"""The length of a row is √(|r|² + FLOOR²), which leaves û = 0 of a zero vector: no operation has to look for one."""


def pack(vectors: Vectors, dtype: torch.dtype, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of the raw ones: (rows, w) and (rows, 1), in `dtype`.

    The rows are û for ETHER; û, −û, v̂ for ETHER+, and v̂, −û, û of its output side. So the vectors of a side are two
    rows apart, and with their factors −1 and 1 they follow one another. Between the sides lie `spare` rows to be
    written over. What lies in a row beyond a vector is no part of any.
    """
    u, v, u_out, v_out = vectors
    inner, outer = _paddings(vectors, dtype)
    if v is None:
        parts = [u, inner]
    else:
        parts = [u, inner, u, inner, v, inner]
    if u_out is not None:
        parts += [*_spare(u, inner, spare, dtype), v_out, outer, u_out, outer, u_out, outer]
    rows = torch.cat(parts, 1).view(-1, u.shape[1] + inner.shape[1])
    return torch.ops.aten._weight_norm_interface(rows, _signs(vectors, spare, dtype), 0)


def raw_gradients(
    vectors: Vectors, of_input: Tensor, of_output: Tensor | None, lengths: Tensor, spare: int = 0
) -> list[Tensor | None]:
    """dL/dr for the raw vectors, from the gradients of their unit vectors, in which the factors −1 and 1 are missing.

    of_input: (m, i), of u (and v). of_output: (2, o), of v_out and u_out. lengths: as from `pack`, which computes in
    their dtype.
    """
    u, v, u_out, v_out = vectors
    inner, outer = _paddings(vectors, lengths.dtype)
    zeros, zeros_out = _paddings(vectors, lengths.dtype, _zeros)
    raws, grads = [u, inner], [of_input[:1], zeros]
    if v is not None:
        raws, grads = [*raws, v, inner], [*grads, of_input[1:], zeros]
    if u_out is not None:
        between = _spare(u, inner, spare, lengths.dtype)
        raws += [*between, v_out, outer, u_out, outer]
        grads += [*between, of_output[:1], zeros_out, of_output[1:], zeros_out]
    both = torch.cat(raws + grads, 1).view(2, -1, u.shape[1] + inner.shape[1])
    # Those of the rows with the factors.
    rows = slice(0 if v is None else 1, None if u_out is None else -1)
    signs = _signs(vectors, spare, lengths.dtype)[rows]
    found = torch.ops.aten._weight_norm_interface_backward(both[1], both[0], signs, lengths[rows], 0)[0]
    ordered = [(u, 0), (v, 1), (u_out, -1), (v_out, -2)]
    return [
        None if raw is None else found[k].narrow(0, 0, raw.shape[1]).unsqueeze(0).to(raw.dtype) for raw, k in ordered
    ]


def add_product(base: Tensor, left: Tensor, right: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor · (base + left @ right), the last step of a gradient: in `dtype`, where that costs no operation more.

    On a CPU a product of half precision has that precision; `raw_gradients` then goes on in float32.
    """
    if base.dtype != dtype and base.is_cuda:
        return torch.addmm(base, left, right, out_dtype=dtype, beta=factor, alpha=factor)
    return torch.addmm(base, left, right, beta=factor, alpha=factor)


def write_product(out: Tensor, left: Tensor, right: Tensor, base: Tensor | None = None) -> None:
    """left @ right, and base + that where there is one, into rows of a larger tensor."""
    if torch.compiler.is_compiling():  # it takes no such `out`, and makes one operation of the two itself
        out.copy_(left @ right if base is None else torch.addmm(base, left, right))
    elif base is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(base, left, right, out=out)


def working_dtype(weight: Tensor, vectors: Vectors) -> torch.dtype:
    """What vectors are normalised in: float32, or float64 where the weight or they are."""
    return torch.promote_types(accurate_dtype(weight.dtype), accurate_dtype(vectors.u.dtype))


def _paddings(
    vectors: Vectors, dtype: torch.dtype, kind: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """What fills the rows of the input and of the output side to one width, a multiple of 8 (for aligned products)."""
    inputs, outputs = vectors.u.shape[1], 0 if vectors.u_out is None else vectors.u_out.shape[1]
    width, kind = 8 * (max(inputs, outputs) // 8 + 1), kind or _floor
    make = _constants(vectors.u)
    return make(kind, width - inputs, dtype), make(kind, width - outputs, dtype) if outputs else None


def _spare(u: Tensor, inner: Tensor, rows: int, dtype: torch.dtype) -> list[Tensor]:
    return [_constants(u)(_ones, rows * (u.shape[1] + inner.shape[1]), dtype)] if rows else []


def _signs(vectors: Vectors, spare: int, dtype: torch.dtype) -> Tensor:
    """The factors of the rows of `pack`, (rows, 1)."""
    make = _constants(vectors.u)
    if vectors.v is None:
        return make(_column, (1.0,), dtype)
    one_sided = (1.0, -1.0, 1.0)
    return make(_column, one_sided if vectors.u_out is None else (*one_sided, *(1.0,) * spare, *one_sided), dtype)


def _constants(like: Tensor) -> Callable[..., Tensor]:
    """What makes a constant on the device of a tensor, once where that is possible.

    A compiler and tensors without data make their own: theirs mean nothing outside of them.
    """
    keep = not torch.compiler.is_compiling() and type(like) in (Tensor, nn.Parameter)
    return functools.partial(_kept if keep else _made, like.device)


def _made(device: torch.device, make: Callable[..., Tensor], *args: object) -> Tensor:
    return make(*args, device)


@functools.lru_cache(maxsize=256)
def _kept(device: torch.device, make: Callable[..., Tensor], *args: object) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make(*args, device)


def _floor(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[FLOOR] + [0.0] * (length - 1)], dtype=dtype, device=device)


def _zeros(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(1, length, dtype=dtype, device=device)


def _ones(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(1, length, dtype=dtype, device=device)


def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
