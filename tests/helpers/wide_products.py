"""The operators of a single block as they compute on a GPU, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from ether_diffusion.tuner.operators import products


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Operands of half precision, product and sums in float32."""
    assert left.dtype in products.HALF and left.dtype == right.dtype
    return left.float() @ right.float()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "multiplies_wide", lambda a: a.dtype in products.HALF)
        patch.setattr(products, "wide_product", wide_product)
        yield
