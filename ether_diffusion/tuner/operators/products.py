"""Products of a few rows with large matrices: the large ones are read as they are, sums are float32.

Half precision is never summed up in half precision. CUDA multiplies it into float32 without a cast of the large
tensor; elsewhere PyTorch has no such product, and the large tensor is cast once (`as_operand`). A product with one
row is a product with a vector, which is faster than one of matrices.

Axes: r rows, at most a few; a and b the axes of a large matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def multiplies_wide(a: Tensor) -> bool:
    """Whether `wide_product` takes this tensor."""
    return a.is_cuda and a.dtype in HALF


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of half precision, in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def rounded_update(weight: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """weight + factor · leftᵀ right, all of half precision, summed in float32 and rounded once."""
    return torch.addmm(weight, left.T, right, alpha=factor)


def reads_half(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product` takes a large tensor as it is, though `dtype` is another one."""
    return dtype == torch.float32 and multiplies_wide(a)


def as_operand(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A large tensor as `product` takes it: cast to `dtype` where it cannot be multiplied into that."""
    return a if reads_half(a, dtype) else a.to(dtype)


def product(rows: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """rows @ a, (r, b), in `dtype`: rows (r, a), a (a, b) from `as_operand`; rows are rounded to a's dtype."""
    return dot(rows, a) if a.dtype == dtype else wide_product(rows.to(a.dtype), a)


def dot(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, a) @ (a, b), of one dtype."""
    return (columns.T @ rows[0]).unsqueeze(0) if len(rows) == 1 else rows @ columns


def write_dot(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """`dot`, into rows of a larger tensor."""
    if len(rows) == 1:
        write(out[0], torch.mv, columns.T, rows[0])
    else:
        write(out, torch.mm, rows, columns)


def write(out: Tensor, operation: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """The result of an operation, in a part of a larger tensor."""
    if torch.compiler.is_compiling():  # takes no part of a tensor as `out`, and makes one operation of the two itself
        return out.copy_(operation(*operands))
    return operation(*operands, out=out)


def add_outer(base: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """base + factor · leftᵀ right: base (a, b), left (r, a), right (r, b), of one dtype."""
    if len(left) == 1:
        return torch.addr(base, left[0], right[0], alpha=factor)
    return torch.addmm(base, left.T, right, alpha=factor)


def add_outer_(base: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`add_outer` in place; left and right are rounded to the dtype of the base."""
    left, right = left.to(base.dtype), right.to(base.dtype)
    if len(left) == 1:
        return base.addr_(left[0], right[0], alpha=factor)
    return base.addmm_(left.T, right, alpha=factor)
