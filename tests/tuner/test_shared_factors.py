"""Factors that are made for all layers at once: the same numbers, and never those of other vectors."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.tuner.shared_factors import ModelFactors

METHODS = {
    "ether": {"method": "ether"},
    "ether_plus_one_sided": {"method": "ether_plus", "sides": "input"},
    "ether_plus": {"method": "ether_plus"},
}
each_method = pytest.mark.parametrize("method", METHODS)


def model(method="ether_plus", **config) -> nn.Sequential:
    """Layers of several shapes, two of one."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 16))
    config = EtherConfig(**METHODS[method], target_modules=["0", "1", "3", "4"], init_weights=False, **config)
    return inject_adapter_in_model(config, layers.requires_grad_(False))


def vectors_of(layers: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layers.parameters() if parameter.requires_grad]


def gradients(layers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(layers(x).float().square().sum(), vectors_of(layers))


def ether_layers(layers: nn.Module) -> list[EtherLayer]:
    return [layer for layer in layers if isinstance(layer, EtherLayer)]


@each_method
@pytest.mark.parametrize("rows", [4, 200])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, "autocast", torch.bfloat16])
def test_outputs_and_gradients_are_those_of_layers_on_their_own(method, rows, strength, dtype):
    layers, x = model(method), torch.randn(rows, 16)
    if dtype != "autocast":
        layers, x = layers.to(dtype), x.to(dtype)
    for layer in ether_layers(layers):
        layer.set_scale("default", strength)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        own = [layers(x), *gradients(layers, x)]
        with ModelFactors(layers).shared():
            assert all(layer.shared_factors is not None for layer in ether_layers(layers))
            shared = [layers(x), *gradients(layers, x)]
    for ours, theirs in zip(shared, own, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_find_them_in_the_backward_pass(reentrant):
    layers, x = model(), torch.randn(40, 16, requires_grad=True)
    expected = gradients(layers, x)
    with ModelFactors(layers).shared():
        y = x
        for part in (layers[:2], layers[2:4], layers[4:]):
            y = checkpoint(part, y, use_reentrant=reentrant)
        y.square().sum().backward()
    for parameter, theirs in zip(vectors_of(layers), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


def test_the_backward_pass_may_come_after_and_gradients_add_up():
    layers, x = model(), torch.randn(4, 16)
    expected = gradients(layers, x)
    factors = ModelFactors(layers)
    for _ in range(2):
        with factors.shared():
            loss = layers(x).square().sum() / 2
        loss.backward()
    for parameter, theirs in zip(vectors_of(layers), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.ether_u["default"].copy_(torch.ones(1, 16)),
        lambda layer: torch._foreach_add_([layer.ether_u["default"]], 1.0),
        lambda layer: layer.ether_u.update({"default": nn.Parameter(torch.ones(1, 16))}),
        lambda layer: layer.base_layer.weight.mul_(2),
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(24, 16), requires_grad=False)),
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.merge(),
    ],
    ids=["in_place", "as_optimizers_do", "another_vector", "weight", "another_weight", "strength", "merged"],
)
def test_what_changes_inside_counts(change):
    layers, x = model(), torch.randn(4, 16)
    with torch.no_grad(), ModelFactors(layers).shared():
        change(layers[0])
        inside = layers(x)
    torch.testing.assert_close(inside, layers(x))


def test_nothing_is_left_of_them_outside_of_the_context_even_after_an_error():
    layers = model()
    factors = ModelFactors(layers)
    with pytest.raises(ZeroDivisionError), factors.shared():
        raise ZeroDivisionError
    assert not any(layer.shared_factors for layer in factors.layers)
    with factors.shared(), pytest.raises(RuntimeError, match="leave that context first"), factors.shared():
        pass
    assert not any(layer.shared_factors for layer in factors.layers)


def test_layers_that_cannot_share_do_without():
    x = torch.randn(4, 16)
    several, hooked, compiled = model(num_blocks=2), model(), model()
    for layer in ether_layers(hooked):
        layer.base_layer.register_forward_hook(lambda *_: None)
    compiled.compile(backend="eager")
    for layers in (several, hooked, compiled):
        expected = layers(x)
        with ModelFactors(layers).shared():
            assert not any(layer.shared_factors for layer in ether_layers(layers))
            torch.testing.assert_close(layers(x), expected)


def test_a_compiled_graph_makes_its_own():
    layers, x = model(), torch.randn(4, 16)
    expected = gradients(layers, x)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with ModelFactors(layers).shared():
        compiled(x).square().sum().backward()
    for parameter, theirs in zip(vectors_of(layers), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)


@each_method
def test_vectors_of_a_layer_that_was_not_called_get_no_gradient(method):
    layers, x = model(method), torch.randn(4, 24)
    expected = torch.autograd.grad(layers[1](x).square().sum(), vectors_of(layers[1]))
    with ModelFactors(layers).shared():
        layers[1](x).square().sum().backward()
    for parameter, theirs in zip(vectors_of(layers[1]), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs)
    assert all(parameter.grad is None for k in (0, 3, 4) for parameter in layers[k].parameters())


def test_frozen_vectors_stay_without_gradients():
    layers, x = model(), torch.randn(40, 16, requires_grad=True)
    expected = torch.autograd.grad(layers(x).square().sum(), x)
    layers.requires_grad_(False)
    with ModelFactors(layers).shared():
        (ours,) = torch.autograd.grad(layers(x).square().sum(), x)
    torch.testing.assert_close(ours, *expected)


@each_method
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e30])
def test_vectors_of_extreme_length_give_finite_gradients(method, length):
    layers, x = model(method), torch.randn(40, 16)
    with torch.no_grad():
        for vector in vectors_of(layers):
            vector.mul_(length)
    own = gradients(layers, x)
    with ModelFactors(layers).shared():
        for ours, theirs in zip(gradients(layers, x), own, strict=True):
            assert torch.isfinite(ours).all() and (ours.any() or not length)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


class Checkpointed(nn.Module):
    """The layers of `model` in three parts, each checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.layers[:2], self.layers[2:4], self.layers[4:]):
            x = checkpoint(part, x, use_reentrant=False)
        return x


def one_of_two(rank: int, rendezvous: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(5)
    data, single = torch.randn(2, 2, 40, 16), Checkpointed()  # of each part of a step and each process
    parallel = nn.parallel.DistributedDataParallel(Checkpointed())
    factors = ModelFactors(parallel)
    with parallel.no_sync(), factors.shared():
        parallel(data[0, rank]).square().mean().backward()
    with factors.shared():
        parallel(data[1, rank]).square().mean().backward()
    sum(single.layers(each).square().mean() / 2 for each in data.flatten(0, 1)).backward()
    for ours, theirs in zip(vectors_of(parallel), vectors_of(single), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_that_accumulate_gradients_over_checkpointed_parts_have_those_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "rendezvous"),), nprocs=2)
