"""The maths: every form against the dense definition, and what the paper proves of the transforms."""

import math

import pytest
import torch
from helpers.oracle import METHODS, dense_weight, raw_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from ether_diffusion.tuner.transforms import Vectors, adapt_weight, low_rank_delta, normalize

SHAPES = [(8, 12), (12, 8, 3, 3), (8, 12, 3, 1), (8, 4, 1, 1)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 0.0])
def test_the_adapted_weight_is_the_dense_definition(method, shape, n, strength):
    weight, vectors = torch.randn(shape, dtype=torch.float64), raw_vectors(method, shape, n)
    torch.testing.assert_close(adapt_weight(weight, vectors, strength), dense_weight(weight, *vectors, strength))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_low_rank_factors_are_the_exact_delta(method, shape, n):
    weight, vectors = torch.randn(shape, dtype=torch.float64), raw_vectors(method, shape, n)
    down, up = low_rank_delta(weight, vectors, 0.7)
    expected = dense_weight(weight, *vectors, 0.7) - weight
    torch.testing.assert_close((up @ down).view(shape), expected)
    kernel = math.prod(shape[2:])
    sides = {"ether": n * kernel, "ether_plus_one_sided": 2 * n * kernel, "ether_plus": 2 * n * kernel + 2 * n}
    assert down.shape[0] == up.shape[1] == sides[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2, 1)])
@pytest.mark.parametrize("n", [1, 2])
def test_gradients_of_the_adapted_weight_agree_with_the_dense_definition(method, shape, n):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [weight, *raw_vectors(method, shape, n, trained=True).named().values()]

    def structured(weight, *raws):
        return adapt_weight(weight, Vectors(*raws), 0.6)

    assert torch.autograd.gradcheck(structured, inputs)
    g = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad(structured(*inputs), inputs, g)
    theirs = torch.autograd.grad(dense_weight(*inputs, strength=0.6), inputs, g)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def matrix_of(*vectors: torch.Tensor) -> torch.Tensor:
    """H of `u`, or H⁺ of `u` and `v`, as the adapted identity."""
    return adapt_weight(torch.eye(vectors[0].numel(), dtype=vectors[0].dtype), Vectors(*vectors))


sizes = st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, 6)))
seeds = st.integers(0, 2**20)


@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=seeds)
def test_a_reflection_is_what_the_paper_proves(size, seed):
    n, width = size
    u = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    identity, matrix = torch.eye(n * width, dtype=torch.float64), matrix_of(u)
    torch.testing.assert_close(matrix.T @ matrix, identity)
    torch.testing.assert_close(matrix @ matrix, identity)
    assert torch.linalg.det(matrix).item() == pytest.approx((-1) ** n)
    assert torch.linalg.norm(matrix - identity).item() == pytest.approx(2 * math.sqrt(n))


@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=seeds)
def test_ether_keeps_the_singular_values_of_a_weight(size, seed):
    n, width = size
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, n * width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(adapt_weight(weight, Vectors(u))), torch.linalg.svdvals(weight))


@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=seeds)
def test_the_distance_of_ether_plus_from_the_identity_is_bounded(size, seed):
    n, width = size
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(n * width, dtype=torch.float64)
    assert torch.linalg.norm(matrix_of(u, v) - identity).item() <= math.sqrt(2 * n) + 1e-12


@settings(deadline=None, max_examples=40)
@given(seed=seeds, factor=st.floats(1e-6, 1e6))
def test_the_length_of_a_raw_vector_does_not_matter(seed, factor):
    u = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(normalize(factor * u), normalize(u))


def test_ether_plus_with_opposite_vectors_is_the_identity_and_its_gradient_leaves_it():
    u = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1).requires_grad_()
    v = (-u).detach().requires_grad_()
    weight = torch.randn(16, 16)
    adapted = adapt_weight(weight, Vectors(u, v))
    torch.testing.assert_close(adapted, weight)
    adapted.backward(torch.randn(16, 16))
    assert v.grad.abs().max() > 1e-3 and u.grad.abs().max() > 1e-3


def test_strength_zero_is_the_very_same_tensor():
    weight, u = torch.randn(4, 6), torch.randn(2, 3)
    assert adapt_weight(weight, Vectors(u), 0.0) is weight
    assert adapt_weight(weight, Vectors(u, u), 0.0) is weight


def test_half_strength_erases_the_direction():
    u = torch.randn(1, 6, dtype=torch.float64)
    assert adapt_weight(u, Vectors(u), 0.5).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, torch.finfo(torch.float32).smallest_normal / 4, 1e-45, 6e-8, 1e38])
def test_extreme_vectors_give_no_nan_forward_or_backward(dtype, value):
    raw = torch.zeros(2, 4, dtype=torch.float32)
    raw[0, 1] = value
    raw[1, 2:] = -value
    u = raw.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).requires_grad_()
    v = u.detach().flip(-1).requires_grad_()
    weight = torch.randn(8, 8, dtype=dtype, requires_grad=True)
    adapted = adapt_weight(adapt_weight(weight, Vectors(u)), Vectors(u, v, u, v))
    adapted.float().sum().backward()
    for tensor in (adapted, weight.grad, u.grad, v.grad):
        assert torch.isfinite(tensor).all()


def test_a_zero_vector_leaves_its_block_alone():
    u = torch.stack([torch.zeros(4), torch.randn(4)])
    weight = torch.randn(3, 8)
    adapted = adapt_weight(weight, Vectors(u))
    assert torch.equal(adapted[:, :4], weight[:, :4]) and not torch.allclose(adapted[:, 4:], weight[:, 4:])


def test_a_tiny_vector_in_half_precision_keeps_its_direction():
    u = torch.tensor([[1e-4, 0, 0, 0]], dtype=torch.float16)
    torch.testing.assert_close(normalize(u), torch.tensor([[1.0, 0, 0, 0]]))


def test_nan_in_a_vector_is_not_hidden():
    assert torch.isnan(adapt_weight(torch.ones(1, 4), Vectors(torch.full((1, 4), float("nan"))))).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    weight, u = torch.randn(64, 512).to(dtype), torch.randn(1, 512)
    exact, rounded = dense_weight(weight, u), adapt_weight(weight, Vectors(u))
    assert (rounded.double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max() * 1.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapt_weight(weight, Vectors(u)), rounded)


def test_blocks_do_not_mix():
    u, weight = torch.randn(4, 3), torch.zeros(1, 12)
    weight[0, 4] = 1.0
    adapted = adapt_weight(weight, Vectors(u))
    assert adapted[0, :3].abs().max() == 0 and adapted[0, 6:].abs().max() == 0
