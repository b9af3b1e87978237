"""What half precision costs: relative errors of outputs and gradients, held to measured values.

The bounds are what the operators had before their vectors' part was made for all layers at once, with every sum over
rows and every product of the weight with a vector in float32: on the CPU, and as a GPU computes.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers.oracle import METHODS, dense_weight, raw_vectors
from helpers.wide_products import as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from ether_diffusion.tuner.operators import adapted_linear
from ether_diffusion.tuner.operators.products import as_operand, product
from ether_diffusion.tuner.operators.shared import FactorGroup

OUTPUTS, INPUTS, ROWS, SEEDS = 192, 128, 512, 5
MODES = {"autocast": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16)}
"""Dtypes of the weight and of x; what is multiplied is bfloat16 in both."""

# Relative errors of y, of the gradient of x, and of those of the vectors: u, v, u_out, v_out.
BOUNDS = {
    ("CPU", "autocast", "weight"): {
        "ether": (2.88e-3, 2.35e-3, 1.60e-3),
        "ether_plus_one_sided": (2.87e-3, 2.34e-3, 1.60e-3, 1.74e-3),
        "ether_plus": (2.87e-3, 2.34e-3, 1.61e-3, 1.75e-3, 1.68e-3, 1.67e-3),
    },
    ("CPU", "autocast", "low_rank"): {
        "ether": (3.39e-3, 2.96e-3, 1.60e-3),
        "ether_plus_one_sided": (3.32e-3, 2.87e-3, 1.60e-3, 1.74e-3),
        "ether_plus": (3.32e-3, 2.87e-3, 1.61e-3, 1.75e-3, 1.68e-3, 1.67e-3),
    },
    ("CPU", "bfloat16", "weight"): {
        "ether": (2.34e-3, 2.54e-3, 5.48e-7),
        "ether_plus_one_sided": (2.34e-3, 2.56e-3, 4.70e-7, 5.03e-7),
        "ether_plus": (2.35e-3, 2.55e-3, 4.05e-7, 4.10e-7, 3.93e-7, 4.12e-7),
    },
    ("CPU", "bfloat16", "low_rank"): {
        "ether": (2.44e-3, 2.92e-3, 5.48e-7),
        "ether_plus_one_sided": (2.36e-3, 2.84e-3, 4.70e-7, 5.03e-7),
        "ether_plus": (2.37e-3, 2.84e-3, 4.05e-7, 4.10e-7, 3.93e-7, 4.12e-7),
    },
    ("GPU", "autocast", "weight"): {
        "ether": (2.88e-3, 2.35e-3, 2.74e-3),
        "ether_plus_one_sided": (2.87e-3, 2.34e-3, 2.74e-3, 2.96e-3),
        "ether_plus": (2.87e-3, 2.34e-3, 2.74e-3, 2.96e-3, 3.00e-3, 3.02e-3),
    },
    ("GPU", "autocast", "low_rank"): {
        "ether": (3.41e-3, 2.99e-3, 2.74e-3),
        "ether_plus_one_sided": (3.33e-3, 2.88e-3, 2.74e-3, 2.96e-3),
        "ether_plus": (3.33e-3, 2.88e-3, 2.74e-3, 2.96e-3, 3.00e-3, 3.02e-3),
    },
    ("GPU", "bfloat16", "weight"): {
        "ether": (2.34e-3, 2.54e-3, 2.25e-3),
        "ether_plus_one_sided": (2.34e-3, 2.56e-3, 2.25e-3, 2.44e-3),
        "ether_plus": (2.35e-3, 2.55e-3, 2.26e-3, 2.45e-3, 2.42e-3, 2.35e-3),
    },
    ("GPU", "bfloat16", "low_rank"): {
        "ether": (2.47e-3, 2.95e-3, 2.25e-3),
        "ether_plus_one_sided": (2.38e-3, 2.85e-3, 2.25e-3, 2.44e-3),
        "ether_plus": (2.39e-3, 2.86e-3, 2.26e-3, 2.45e-3, 2.42e-3, 2.35e-3),
    },
}


def errors(method: str, mode: str, form: str, at_once: bool, seed: int) -> list[float]:
    """Relative errors against the dense definition in float64, of one layer with random numbers."""
    torch.manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5
    x, g = torch.randn(ROWS, INPUTS), torch.randn(ROWS, OUTPUTS).bfloat16()
    weight, x = (tensor.to(dtype) for tensor, dtype in zip((weight, x), MODES[mode], strict=True))
    x.requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    vectors = raw_vectors(method, (OUTPUTS, INPUTS), 1, torch.float32)
    vectors = vectors.map(lambda each: torch.randn(each.shape, generator=generator).requires_grad_())
    inputs = [x, *vectors.named().values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        # Of two layers, as one alone would leave their axis untested.
        shared = FactorGroup([weight, weight], [vectors, vectors]).layers[1] if at_once else None
        y = adapted_linear(x, weight, None, vectors, form=form, shared=shared)
    ours = [y, *torch.autograd.grad(y, inputs, g)]
    exact = x.double() @ dense_weight(weight, *vectors).T
    exact = [exact, *torch.autograd.grad(exact, inputs, g.double())]
    assert [each.dtype for each in ours[2:]] == [torch.float32] * len(ours[2:])
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("device", "mode", "form"), BOUNDS)
def test_errors_in_bfloat16_are_no_larger_than_they_were(device, mode, form, method, at_once):
    with as_on_a_gpu() if device == "GPU" else nullcontext():
        found = [errors(method, mode, form, at_once, seed) for seed in range(SEEDS)]
    means = torch.tensor(found).mean(0).tolist()
    for mean, bound in zip(means, BOUNDS[device, mode, form][method], strict=True):
        assert mean <= bound * (1.01 if bound > 1e-5 else 1.05), (means, bound)  # float32 sums of other machines


def test_a_gpu_multiplies_half_precision_into_float32_without_a_cast_of_the_large_tensor():
    with FakeTensorMode():
        rows, a = torch.empty(4, 64, device="cuda"), torch.empty(64, 512, dtype=torch.bfloat16, device="cuda")
        assert as_operand(a, torch.float32) is a
        assert product(rows, a, torch.float32).dtype == torch.float32
        assert as_operand(a, torch.float64).dtype == torch.float64
