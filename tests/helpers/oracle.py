"""The dense definition of ETHER and ETHER+, in float64: what every structured form is held to.

Source: arXiv:2405.20271, equations 1 and 3, with block-diagonal matrices written out.
"""

import torch
from torch import Tensor

from ether_diffusion.tuner.transforms import Vectors

METHODS = ["ether", "ether_plus_one_sided", "ether_plus"]


def unit(raw: Tensor) -> Tensor:
    return raw.double() / raw.double().norm(dim=-1, keepdim=True)


def dense(u: Tensor, v: Tensor | None = None) -> Tensor:
    """The (d, d) matrix H of `u` (n, d/n), or H⁺ of `u` and `v`."""
    blocks = []
    for k in range(u.shape[0]):
        block = torch.eye(u.shape[1], dtype=torch.float64)
        uk = unit(u)[k]
        if v is None:
            block = block - 2 * torch.outer(uk, uk)
        else:
            vk = unit(v)[k]
            block = block - torch.outer(uk, uk) + torch.outer(vk, vk)
        blocks.append(block)
    return torch.block_diag(*blocks)


def dense_weight(weight, u, v=None, u_out=None, v_out=None, strength=1.0) -> Tensor:
    """W + α (H̃ W H − W) in float64; a convolution's weight (o, i, *k) is transformed at each kernel position."""
    w = weight.double()
    full = torch.einsum("oi...,ij->oj...", w, dense(u, v))
    if u_out is not None:
        full = torch.einsum("po,oi...->pi...", dense(u_out, v_out), full)
    return w + strength * (full - w)


def raw_vectors(method: str, shape: tuple[int, ...], n: int, dtype=torch.float64, trained=False) -> Vectors:
    """Random vectors of a method, for a weight of a shape."""
    generator = torch.Generator().manual_seed(0)
    widths = [shape[1], shape[1], shape[0], shape[0]][: 2 ** METHODS.index(method)]
    found = (3 * torch.randn(n, width // n, generator=generator, dtype=torch.float64) for width in widths)
    return Vectors(*(vector.to(dtype).requires_grad_(trained) for vector in found))
