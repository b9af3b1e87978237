"""What adapters change: exactly of low rank, alone and stacked."""

import numpy as np
import pytest
import torch
from helpers.oracle import dense_weight

from ether_diffusion.export.changes import alignment, relative_error, stacked_delta
from ether_diffusion.tuner.transforms import Adaptation, Vectors


@pytest.mark.parametrize("shape", [(6, 8), (12, 4), (6, 8, 3, 3), (4, 8, 1, 3)])
def test_a_stack_of_adapters_is_one_change_of_low_rank(shape):
    torch.manual_seed(0)
    o, i, kernel = shape[0], shape[1], int(np.prod(shape[2:]))
    weight = torch.randn(shape)
    stack = [
        Adaptation(Vectors(torch.randn(2, i // 2)), 0.3),
        Adaptation(Vectors(torch.randn(1, i), torch.randn(1, i)), 1.0),
        Adaptation(Vectors(*(torch.randn(2, width // 2) for width in (i, i, o, o))), 0.8),
    ]
    for adapters, rank in ((stack[:1], 2 * kernel), (stack[1:2], 2 * kernel), (stack, (2 + 2 + 4) * kernel + 4)):
        exact = weight.double()
        for vectors, strength in adapters:
            exact = dense_weight(exact, *vectors, strength)
        exactly = [Adaptation(vectors.map(torch.Tensor.double), strength) for vectors, strength in adapters]
        down, up = stacked_delta(weight, exactly)
        assert len(down) == up.shape[1] == min(rank, o, i * kernel)
        assert torch.allclose((up @ down).view(shape), exact - weight, atol=1e-12)


def test_a_change_near_the_start_of_ether_plus_is_as_exact_as_any():
    """There v̂ ≈ −û: the terms of the change are ten thousand times as large as the change."""
    torch.manual_seed(0)
    weight, u, u_out = torch.randn(32, 48), torch.randn(1, 48), torch.randn(1, 32)
    vectors = Vectors(u, -u + 1e-4 * torch.randn(1, 48), u_out, -u_out + 1e-4 * torch.randn(1, 32))
    factors = stacked_delta(weight, [Adaptation(vectors.map(torch.Tensor.double))])
    exact = dense_weight(weight, *vectors) - weight
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        down, up = (factor.to(dtype).double() for factor in factors)
        assert (up @ down - exact).norm() <= tolerance * exact.norm()


def test_the_error_of_a_change_that_vanishes_is_told_relative_to_the_weight():
    zero, weight = torch.zeros(3, 4), torch.ones(3, 4)
    assert relative_error(zero, zero, weight) == 0
    assert relative_error(zero + 1e-17, zero, weight) == pytest.approx(1e-5)
    assert relative_error(1.5 * weight, weight, weight) == pytest.approx(0.5)


def test_without_conflict_exported_adapters_add_up_to_their_composition_and_with_it_they_do_not():
    torch.manual_seed(0)
    weight, u = torch.randn(6, 8).double(), torch.randn(1, 8).double()
    other = torch.randn(1, 8).double()
    for v, expected in ((other - (other @ u.T) / (u @ u.T) * u, 0.0), (u + 0.1 * other, None), (-3 * u, 1.0)):
        found = alignment(Vectors(u), Vectors(v))
        changes = [stacked_delta(weight, [Adaptation(Vectors(x))]) for x in (u, v)]
        added = sum((up @ down for down, up in changes), start=weight)
        composed = dense_weight(dense_weight(weight, u), v)
        error = (added - composed).norm()
        assert expected is None or found == pytest.approx(expected, abs=1e-12)
        # W D_a D_b = 4 (û_a·û_b) W û_a û_bᵀ
        assert error.item() == pytest.approx(4 * found * (weight @ u.T / u.norm()).norm().item(), abs=1e-12)


def test_conflicts_look_at_every_direction_of_both_sides_and_at_any_blocks():
    e = torch.eye(4)
    plus = Vectors(e[:1], e[1:2], e[2:3], e[3:])
    assert alignment(plus, Vectors(e[2:3])) == 0
    assert alignment(plus, Vectors(e[1:2])) == 1
    assert alignment(Vectors(e[2:3]), Vectors(e[:1], u_out=e[2:3])) == 0
    assert alignment(plus, Vectors(e[3:], e[2:3], e[3:], e[:1])) == 1
    assert alignment(Vectors(torch.tensor([[3.0, 0.0], [0.0, 5.0]])), Vectors(e[3:])) == 1
