"""The adapted linear layer as one operator: each form against the dense definition, in values and gradients."""

import pytest
import torch
import torch.utils.checkpoint
from helpers.layers import make
from helpers.oracle import METHODS, dense, dense_weight, raw_vectors
from torch import nn

from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.operators import adapted_linear, adapted_weight, displacement
from ether_diffusion.tuner.transforms import Vectors

FORMS = ["weight", "low_rank"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)])
def test_values_and_gradients_are_those_of_the_dense_definition(form, method, n, strength, shape):
    torch.manual_seed(1)
    weight = torch.randn(12, 8, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    vectors = raw_vectors(method, (12, 8), n, trained=True)
    ours = adapted_linear(x, weight, bias, vectors, strength, form)
    dense = x @ dense_weight(weight, *vectors, strength=strength).T + bias
    torch.testing.assert_close(ours, dense)
    g = torch.randn_like(dense)
    inputs = [x, bias, *vectors.named().values()]
    for our, their in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(dense, inputs, g), strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 1)])
def test_the_adapted_weight_is_the_dense_definition(method, n, strength, shape):
    weight = torch.randn(shape, dtype=torch.float64)
    vectors = raw_vectors(method, shape, n)
    torch.testing.assert_close(adapted_weight(weight, vectors, strength), dense_weight(weight, *vectors, strength))


@pytest.mark.parametrize("method", METHODS)
def test_the_adapted_weight_passes_gradients_on(method):
    weight, vectors = torch.randn(6, 4, dtype=torch.float64), raw_vectors(method, (6, 4), 1, trained=True)
    inputs = list(vectors.named().values())
    assert torch.autograd.gradcheck(lambda *raws: adapted_weight(weight, Vectors(*raws), 0.6), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
def test_the_analytic_gradient_passes_gradcheck(form, method, n):
    vectors = raw_vectors(method, (6, 4), n, trained=True)
    x, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)

    def function(x, *raws):
        return adapted_linear(x, weight, None, Vectors(*raws), 0.6, form)

    assert torch.autograd.gradcheck(function, (x, *vectors.named().values()))


@pytest.mark.parametrize("method", ["ether", "ether_plus_one_sided"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_displacement_is_the_dense_transform_less_the_identity(method, n):
    u, v, *_ = raw_vectors(method, (6, 6), n, trained=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(displacement(x, u, v), x @ dense(u, v).T - x)
    assert torch.autograd.gradcheck(displacement, (x, u) if v is None else (x, u, v))


def adapted(base: nn.Module, method="ether_plus", n=1) -> EtherLayer:
    torch.manual_seed(0)
    return make(base.requires_grad_(False), method, n=n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [4, 512])
def test_in_half_precision_no_form_errs_more_than_the_activation_side(form, method, n, dtype, rows):
    torch.manual_seed(0)
    vectors = raw_vectors(method, (640, 320), n, torch.float32)
    weight, x, bias = torch.randn(640, 320) / 18, torch.randn(rows, 320), torch.randn(640)
    weight, x, bias = (t.to(dtype) for t in (weight, x, bias))
    exact = x.double() @ dense_weight(weight, *vectors).T + bias.double()
    z = (x + displacement(x, vectors.u, vectors.v)).to(dtype) @ weight.T
    if vectors.u_out is not None:
        z = (z + displacement(z, vectors.u_out, vectors.v_out)).to(dtype)
    activation_side = z + bias
    error = (adapted_linear(x, weight, bias, vectors, form=form).double() - exact).norm()
    assert error <= 1.02 * (activation_side.double() - exact).norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_float32_and_near_the_dense_definition(form, dtype):
    vectors = raw_vectors("ether_plus", (96, 64), 2, torch.float32, trained=True)
    weight, x = (torch.randn(96, 64) / 8).to(dtype), torch.randn(256, 64).to(dtype).requires_grad_()
    g = torch.randn(256, 96).to(dtype)
    ours = torch.autograd.grad(adapted_linear(x, weight, None, vectors, form=form), [x, *vectors], g)
    dense = torch.autograd.grad(x.double() @ dense_weight(weight, *vectors).T, [x, *vectors], g.double())
    assert [grad.dtype for grad in ours] == [dtype] + [torch.float32] * 4
    for our, their in zip(ours, dense, strict=True):
        assert (our.double() - their.double()).norm() <= 0.01 * their.double().norm()


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_nothing_is_kept_for_the_backward_pass_but_the_input_and_a_few_vectors(method):
    layer = adapted(nn.Linear(64, 96), method)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    for rows in (8, 512):  # the low-rank and the weight side
        x, kept = torch.randn(rows, 64, requires_grad=True), {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        extra = {k: v for k, v in kept.items() if k not in own and k != x.untyped_storage().data_ptr()}
        assert sum(extra.values()) <= 4 * (4 * (rows + 64 + 96) + 4)  # float32, four of each


class Counter:
    """Three ways to have something happen in the call of a layer."""

    def __init__(self) -> None:
        self.calls = 0

    def hook(self, base: nn.Module) -> None:
        base.register_forward_hook(lambda *_: self.count())

    def replace_forward(self, base: nn.Module) -> None:
        stock = base.forward
        base.forward = lambda x: (self.count(), stock(x))[1]

    def parametrize(self, base: nn.Module) -> None:
        counting = nn.Identity()
        counting.register_forward_hook(lambda *_: self.count())
        nn.utils.parametrize.register_parametrization(base, "weight", counting)

    def count(self) -> None:
        self.calls += 1


@pytest.mark.parametrize("way", ["hook", "replace_forward", "parametrize"])
def test_a_layer_below_in_whose_call_something_happens_is_called(way):
    counter, base, x = Counter(), nn.Linear(8, 12), torch.randn(5, 8)
    layer = adapted(base)
    expected = layer(x)
    getattr(counter, way)(base)
    counter.calls = 0
    torch.testing.assert_close(layer(x), expected)
    assert counter.calls


def test_a_weight_that_is_trained_gets_its_gradient():
    layer, x = adapted(nn.Linear(8, 12)), torch.randn(5, 8)
    layer.base_layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("rows", [4, 256])
def test_autocast_gives_its_own_dtype_and_gradients_near_the_exact_ones(method, rows):
    torch.manual_seed(0)
    layer, x = adapted(nn.Linear(64, 96), method), torch.randn(rows, 64)
    exact = layer(x)
    vectors = list(layer.vectors("default").named().values())
    theirs = torch.autograd.grad(exact.square().mean(), vectors)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        ours = torch.autograd.grad(y.float().square().mean(), vectors)  # within the context, too
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() <= 0.01 * exact.norm()
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32 and (our - their).norm() <= 0.03 * their.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_checkpointing_gives_the_same_gradients(method, reentrant):
    layer, x = adapted(nn.Linear(16, 24), method, n=2), torch.randn(40, 16, requires_grad=True)
    inputs = [x, *layer.vectors("default").named().values()]
    plain = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip(inputs, plain, strict=True))


@pytest.mark.parametrize("rows", [3, 200])
def test_an_input_that_needs_no_gradient_changes_no_other(rows):
    layer, x = adapted(nn.Linear(16, 24), n=2), torch.randn(rows, 16)
    vectors = list(layer.vectors("default").named().values())
    frozen = torch.autograd.grad(layer(x).square().sum(), vectors)
    free = torch.autograd.grad(layer(x.clone().requires_grad_()).square().sum(), vectors)
    assert all(torch.equal(a, b) for a, b in zip(frozen, free, strict=True))


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("rows", [4, 256])
def test_it_compiles_with_its_gradients_without_a_graph_break(method, rows):
    layer, x = adapted(nn.Linear(16, 24), method), torch.randn(rows, 16, requires_grad=True)
    inputs = [x, *layer.vectors("default").named().values()]
    plain = torch.autograd.grad(layer(x).square().sum(), inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for our, their in zip(torch.autograd.grad(compiled(x).square().sum(), inputs), plain, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("rows", [4, 256])
def test_what_a_layer_answers_can_be_changed_in_place_as_a_linear_layers_can(method, n, rows):
    layer, x = adapted(nn.Linear(16, 24), method, n), torch.randn(2, rows, 16)
    vectors = list(layer.vectors("default").named().values())
    expected = torch.autograd.grad((layer(x) + 1).square().sum(), vectors)
    for ours, theirs in zip(torch.autograd.grad(layer(x).add_(1).square().sum(), vectors), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_no_rows_are_no_trouble():
    layer, x = adapted(nn.Linear(8, 12)), torch.zeros(0, 3, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 3, 12) and x.grad.shape == x.shape
