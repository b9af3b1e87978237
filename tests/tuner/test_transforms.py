"""The maths: every form against the dense definition, and what the paper proves of the transforms."""

import math

import pytest
import torch
from helpers.oracle import dense, dense_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ether_diffusion.tuner.transforms import adapt_weight, displacement, low_rank_delta, normalize, reflect, relax

SHAPES = [(8, 12), (12, 8, 3, 3), (8, 12, 3, 1), (8, 4, 1, 1)]
FORMS = {
    "ether": ("u",),
    "ether_plus_one_sided": ("u", "v"),
    "ether_plus": ("u", "v", "u_out", "v_out"),
}


def vectors(form: str, shape, n: int, seed: int = 0, dtype=torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    widths = {"u": shape[1], "v": shape[1], "u_out": shape[0], "v_out": shape[0]}
    return {name: 3 * torch.randn(n, widths[name] // n, generator=generator, dtype=dtype) for name in FORMS[form]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 0.0])
def test_the_weight_side_is_the_dense_definition(form, shape, n, strength):
    weight, raw = torch.randn(shape, dtype=torch.float64), vectors(form, shape, n)
    expected = dense_weight(weight, **raw, strength=strength)
    torch.testing.assert_close(adapt_weight(weight, **raw, strength=strength), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_low_rank_factors_are_the_exact_delta(form, shape, n):
    weight, raw = torch.randn(shape, dtype=torch.float64), vectors(form, shape, n)
    down, up = low_rank_delta(weight, **raw, strength=0.7)
    expected = dense_weight(weight, **raw, strength=0.7) - weight
    torch.testing.assert_close((up @ down).view(shape), expected)
    kernel = math.prod(shape[2:])
    sides = {"ether": n * kernel, "ether_plus_one_sided": 2 * n * kernel, "ether_plus": 2 * n * kernel + 2 * n}
    assert down.shape[0] == up.shape[1] == sides[form]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_the_activation_side_is_the_dense_definition(n, strength):
    x, raw = torch.randn(5, 2, 12, dtype=torch.float64), vectors("ether_plus", (12, 12), n)
    for result, matrix in (
        (reflect(x, raw["u"], strength), dense(raw["u"])),
        (relax(x, raw["u"], raw["v"], strength), dense(raw["u"], raw["v"])),
    ):
        torch.testing.assert_close(result, x + strength * (x @ matrix.T - x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2, 1)])
@pytest.mark.parametrize("n", [1, 2])
def test_gradients_of_the_weight_side_agree_with_the_dense_definition(form, shape, n):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    raw = {name: vector.requires_grad_() for name, vector in vectors(form, shape, n).items()}
    names = list(raw)

    def structured(weight, *values):
        return adapt_weight(weight, **dict(zip(names, values, strict=True)), strength=0.6)

    assert torch.autograd.gradcheck(structured, (weight, *raw.values()))
    mask = torch.randn(shape, dtype=torch.float64)
    inputs = [weight, *raw.values()]
    ours = torch.autograd.grad((structured(*inputs) * mask).sum(), inputs)
    theirs = torch.autograd.grad((dense_weight(weight, **raw, strength=0.6) * mask).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("n", [1, 3])
def test_gradients_of_the_activation_side_pass_gradcheck(n):
    raw = vectors("ether_plus_one_sided", (6, 6), n)
    u, v = (vector.requires_grad_() for vector in raw.values())
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, u: reflect(x, u, 0.7), (x, u))
    assert torch.autograd.gradcheck(lambda x, u, v: relax(x, u, v, 0.7), (x, u, v))


sizes = st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, 6)))
seeds = st.integers(0, 2**20)


@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=seeds)
def test_a_reflection_is_what_the_paper_proves(size, seed):
    n, width = size
    u = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    identity = torch.eye(n * width, dtype=torch.float64)
    matrix = reflect(identity, u)  # symmetric: rows are images of the basis
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
    torch.testing.assert_close(torch.linalg.svdvals(adapt_weight(weight, u)), torch.linalg.svdvals(weight))


@settings(deadline=None, max_examples=60)
@given(size=sizes, seed=seeds)
def test_the_distance_of_ether_plus_from_the_identity_is_bounded(size, seed):
    n, width = size
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(n * width, dtype=torch.float64)
    assert torch.linalg.norm(relax(identity, u, v) - identity).item() <= math.sqrt(2 * n) + 1e-12


@settings(deadline=None, max_examples=40)
@given(seed=seeds, factor=st.floats(1e-6, 1e6))
def test_the_length_of_a_raw_vector_does_not_matter(seed, factor):
    u = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(normalize(factor * u), normalize(u))


def test_ether_plus_with_opposite_vectors_is_the_identity_and_its_gradient_leaves_it():
    u = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1).requires_grad_()
    v = (-u).detach().requires_grad_()
    x = torch.randn(16, 16)
    y = relax(x, u, v)
    torch.testing.assert_close(y, x)
    (y * torch.randn(16, 16)).sum().backward()
    assert v.grad.abs().max() > 1e-3 and u.grad.abs().max() > 1e-3


def test_strength_zero_is_the_very_same_tensor():
    weight, x, u = torch.randn(4, 6), torch.randn(3, 6), torch.randn(2, 3)
    assert adapt_weight(weight, u, strength=0.0) is weight
    assert reflect(x, u, 0.0) is x and relax(x, u, u, 0.0) is x


def test_half_strength_erases_the_direction():
    u = torch.randn(1, 6, dtype=torch.float64)
    assert reflect(u, u, 0.5).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, torch.finfo(torch.float32).smallest_normal / 4, 1e-45, 6e-8, 1e38])
def test_extreme_vectors_give_no_nan_forward_or_backward(dtype, value):
    raw = torch.zeros(2, 4, dtype=torch.float32)
    raw[0, 1] = value
    raw[1, 2:] = -value
    u = raw.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).requires_grad_()
    v = u.detach().flip(-1).requires_grad_()
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    y = relax(reflect(x, u), u, v)
    y.float().sum().backward()
    for tensor in (y, x.grad, u.grad, v.grad):
        assert torch.isfinite(tensor).all()
    assert torch.isfinite(adapt_weight(torch.randn(8, 8, dtype=dtype), u, v, u, v)).all()


def test_a_zero_vector_leaves_its_block_alone():
    u = torch.stack([torch.zeros(4), torch.randn(4)])
    x = torch.randn(3, 8)
    y = reflect(x, u)
    assert torch.equal(y[:, :4], x[:, :4]) and not torch.allclose(y[:, 4:], x[:, 4:])


def test_a_tiny_vector_in_half_precision_keeps_its_direction():
    u = torch.tensor([[1e-4, 0, 0, 0]], dtype=torch.float16)
    torch.testing.assert_close(normalize(u), torch.tensor([[1.0, 0, 0, 0]]))


def test_nan_in_a_vector_is_not_hidden():
    assert torch.isnan(reflect(torch.ones(1, 4), torch.full((1, 4), float("nan")))).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x, u = torch.randn(64, 512).to(dtype), torch.randn(1, 512)
    exact = reflect(x.double(), u.double())
    assert (reflect(x, u).double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max() * 1.01
    with torch.autocast("cpu", torch.bfloat16):
        assert displacement(x, u).dtype == torch.float32


def test_blocks_do_not_mix():
    u, x = torch.randn(4, 3), torch.zeros(1, 12)
    x[0, 4] = 1.0
    y = reflect(x, u)
    assert y[0, :3].abs().max() == 0 and y[0, 6:].abs().max() == 0
