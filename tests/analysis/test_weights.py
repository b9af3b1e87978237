"""The analysis of weights: every figure against its dense definition or a known answer, and transforms."""

import math
import time

import pytest
import torch
from helpers.oracle import dense, dense_weight, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import LiveBytes
from peft import HRAConfig, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.analysis.weights import (
    adapted_weights,
    angle_between,
    angles_from_start,
    conflict,
    energy_change,
    hyperspherical_energy,
    transform_distance,
    transform_of,
    weight_distance,
)
from ether_diffusion.tuner.transforms import Vectors


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_vectors(method: str, sides: str, blocks: int, widths: tuple[int, int]) -> Vectors:
    """Raw vectors; widths: inputs and outputs."""
    found = {}
    for seed, (suffix, width) in enumerate(zip(("", "_out"), widths, strict=True)):
        if suffix == "" or sides == "both":
            found[f"u{suffix}"] = 3 * draw(blocks, width // blocks, seed=seed)
            if method == "ether_plus":
                found[f"v{suffix}"] = draw(blocks, width // blocks, seed=seed + 2)
    return Vectors(**found)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(draw(width, width, seed=9)).Q


# Energy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neurons", [1, 2, 300])  # the last in two chunks
def test_orthonormal_neurons_have_the_energy_that_is_said(neurons):
    wanted = neurons * (neurons - 1) / math.sqrt(2)
    frame = 7 * torch.eye(neurons)
    assert hyperspherical_energy(frame) == pytest.approx(wanted)
    assert hyperspherical_energy(frame, half_space=True) == pytest.approx(2 * wanted)


@pytest.mark.parametrize("degrees", [1e-3, 1, 60, 120, 179])
def test_a_pair_has_the_energy_of_its_angle(degrees):
    angle = math.radians(degrees)
    pair = torch.tensor([[1, 0, 0], [math.cos(angle), 0, math.sin(angle)]], dtype=torch.float64)
    near, far = 2 * math.sin(angle / 2), 2 * math.cos(angle / 2)
    assert hyperspherical_energy(pair) == pytest.approx(2 / near, rel=1e-5)
    assert hyperspherical_energy(pair, half_space=True) == pytest.approx(2 / near + 2 / far, rel=1e-5)


def test_the_energy_is_the_sum_over_all_pairs_and_zeros_have_no_direction():
    neurons = draw(520, 6)
    units = neurons / neurons.norm(dim=1, keepdim=True)
    apart = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    assert hyperspherical_energy(neurons) == pytest.approx(apart.reciprocal().sum().item())
    assert hyperspherical_energy(torch.cat([torch.zeros(1, 6), neurons])) == hyperspherical_energy(neurons)
    assert math.isfinite(hyperspherical_energy(torch.ones(3, 4)))


@pytest.mark.parametrize("half_space", [False, True])
def test_turning_all_neurons_and_scaling_each_leaves_the_energy(half_space):
    neurons = draw(30, 12)
    turned = (neurons @ rotation(12)) * draw(30, 1, seed=1).exp()
    found = hyperspherical_energy(turned, half_space=half_space)
    assert found == pytest.approx(hyperspherical_energy(neurons, half_space=half_space), rel=1e-9)
    about = neurons * torch.tensor([1, -1] * 15)[:, None]
    same = hyperspherical_energy(about) == pytest.approx(hyperspherical_energy(neurons))
    assert not same
    assert hyperspherical_energy(about, half_space=True) == pytest.approx(
        hyperspherical_energy(neurons, half_space=True)
    )


def test_the_energy_of_a_convolution_is_that_of_its_flattened_kernels():
    kernels = draw(8, 3, 2, 2)
    assert hyperspherical_energy(kernels) == hyperspherical_energy(kernels.reshape(8, 12))


@pytest.mark.parametrize(("shape", "blocks"), [((20, 12), 1), ((20, 12), 3), ((20, 12, 3, 3), 2)])
def test_one_sided_ether_leaves_the_energy_and_ether_plus_does_not(shape, blocks):
    weight, widths = draw(*shape), (shape[1], shape[0])
    reflected = dense_weight(weight, *draw_vectors("ether", "input", blocks, widths))
    assert energy_change(weight, reflected) == pytest.approx(0, abs=1e-12)
    assert energy_change(weight, reflected, half_space=True) == pytest.approx(0, abs=1e-12)
    for sides in ("input", "both"):
        relaxed = dense_weight(weight, *draw_vectors("ether_plus", sides, 1, widths))
        assert abs(energy_change(weight, relaxed)) > 1e-4


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (HRAConfig(r=2, target_modules=["0"]), True),
        (OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=["0"]), True),
        (OFTConfig(r=0, oft_block_size=4, target_modules=["0"]), False),
    ],
    ids=["HRA", "OFT", "OFT, PEFT's series"],
)
def test_orthogonal_methods_of_peft_keep_the_energy(config, kept):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seeded = torch.Generator().manual_seed(len(name))
            parameter.data.normal_(generator=seeded)
    ((_, before, after),) = adapted_weights(model)
    assert not torch.allclose(before, after, atol=0.1)
    assert (abs(energy_change(before, after)) < 1e-5) == kept


def test_a_single_neuron_has_no_energy_to_change():
    assert energy_change(draw(1, 4), draw(1, 4, seed=1)) == 0


@pytest.mark.slow
def test_the_energy_of_a_wide_layer_needs_no_matrix_of_all_pairs_and_takes_seconds():
    weight = torch.randn(10_240, 1_280, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    with LiveBytes() as live:
        energy = hyperspherical_energy(weight, half_space=True)
    assert live.peak() < 2**29  # the matrix of all pairs alone has 2^29.6 bytes in float64
    assert time.process_time() - started < 60
    assert energy == pytest.approx(2 * 10_240 * 10_239 / math.sqrt(2), rel=0.01)  # nearly at right angles


# Distances and angles -------------------------------------------------------------------------------------------

SHAPES = [(12, 8), (8, 12), (12, 8, 1, 1), (4, 8, 3, 2)]
COMBINATIONS = [("ether", "input"), ("ether_plus", "input"), ("ether_plus", "both")]


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0, 0.0])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "sides"), COMBINATIONS)
def test_the_distance_of_a_weight_is_that_of_the_dense_definition(method, sides, shape, blocks, strength):
    weight = draw(*shape, seed=5)
    vectors = draw_vectors(method, sides, blocks, (shape[1], shape[0]))
    wanted = (dense_weight(weight, *vectors, strength=strength) - weight).norm().item()
    assert weight_distance(weight, vectors, strength) == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_a_reflection_moves_a_weight_by_twice_what_it_does_to_the_direction():
    weight, u = draw(6, 4), draw(1, 4, seed=1)
    assert weight_distance(weight, Vectors(u)) == pytest.approx(2 * (weight @ (u[0] / u.norm())).norm().item())


def test_ether_plus_has_moved_by_nothing_at_its_start_and_by_little_near_it():
    weight, u = draw(12, 8), draw(2, 4, seed=1)
    assert weight_distance(weight, Vectors(u, -u)) < 1e-13
    near = -(u + 1e-9 * draw(2, 4, seed=2))
    wanted = (dense_weight(weight, u, near) - weight).norm().item()
    assert weight_distance(weight, Vectors(u, near)) == pytest.approx(wanted, rel=1e-5) != 0


def test_float32_vectors_and_weights_are_measured_in_float64():
    weight, u = draw(6, 4).float(), draw(1, 4, seed=1).float()
    wanted = (dense_weight(weight, u) - weight.double()).norm().item()
    assert weight_distance(weight.requires_grad_(), Vectors(u.requires_grad_())) == pytest.approx(wanted, rel=1e-12)


def test_vectors_travel_by_the_angle_of_their_lines():
    before = torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 1, 0], [1, 0, 0]])
    after = torch.tensor([[-3.0, 0, 0], [5, 0, 0], [1, 0, 0], [1, 1e-6, 0]])
    wanted = torch.tensor([0, 90, 45, math.degrees(1e-6)], dtype=torch.float64)
    assert torch.allclose(angle_between(before, after), wanted, rtol=1e-5, atol=1e-12)
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(1, 3\)"):
        angle_between(before, after[:1])


# Weights of any method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        EtherConfig(method="ether_plus", init_weights=False, target_modules=["0"]),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]),
        HRAConfig(r=2, init_weights=False, target_modules=["0"]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_adapted_weights_are_those_the_layer_computes_with_and_leave_no_trace(config):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4, bias=False)), config)
    layer, x = model.base_model.model[0], torch.randn(5, 6)
    held = layer.get_base_layer().weight.detach().clone()
    ((name, before, after),) = adapted_weights(model)
    assert name.endswith("0") and torch.equal(before, held)
    assert torch.allclose(x @ after.T, model(x), atol=1e-5)
    assert torch.equal(layer.get_base_layer().weight, held) and not layer.merged


def test_models_without_adapters_or_with_merged_ones_are_refused():
    with pytest.raises(ValueError, match="no layer of the model carries an adapter"):
        next(adapted_weights(nn.Sequential(nn.Linear(2, 2))))
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), EtherConfig(target_modules=["0"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"0 is merged; call unmerge_adapter\(\) first"):
        next(adapted_weights(model))


# Transforms -----------------------------------------------------------------------------------------------------

METHODS = st.sampled_from(["ether", "ether_plus"])
BLOCKS = st.sampled_from([1, 2, 3, 4, 6, 12])


def draw_raws(method: str, blocks: int, seed: int, width: int = 12) -> list[torch.Tensor]:
    """Raw vectors of any length: [u], or [u, v]."""
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(blocks, width // blocks, generator=generator) for _ in range(1 + (method == "ether_plus"))]


@settings(max_examples=60, deadline=None)
@given(method=METHODS, blocks=BLOCKS, seed=st.integers(0, 99))
def test_the_distance_is_that_of_the_dense_transform(method, blocks, seed):
    raws = draw_raws(method, blocks, seed)
    wanted = torch.linalg.matrix_norm(dense(*raws) - torch.eye(12, dtype=torch.float64)).item()
    assert transform_distance(transform_of(*raws)) == pytest.approx(wanted, abs=1e-7)
    if method == "ether":
        assert wanted == pytest.approx(2 * math.sqrt(blocks))


@settings(max_examples=60, deadline=None)
@given(methods=st.tuples(METHODS, METHODS), blocks=st.tuples(BLOCKS, BLOCKS), seed=st.integers(0, 99))
def test_a_conflict_is_that_of_the_dense_transforms_whatever_their_blocks(methods, blocks, seed):
    ours, theirs = (draw_raws(method, n, seed + k) for k, (method, n) in enumerate(zip(methods, blocks, strict=True)))
    found = conflict(transform_of(*ours), transform_of(*theirs))
    a, b = dense(*ours), dense(*theirs)
    assert found.commutator == pytest.approx(torch.linalg.matrix_norm(a @ b - b @ a).item(), abs=1e-6)
    full = [torch.cat([torch.block_diag(*unit(raw)) for raw in raws]) for raws in (ours, theirs)]
    assert found.alignment == pytest.approx((full[0] @ full[1].T).abs().max().item(), abs=1e-12)


def test_an_adapter_clashes_fully_with_itself_and_not_at_all_with_one_at_right_angles():
    one, other = torch.eye(4)[:1], torch.eye(4)[1:2]
    assert conflict(transform_of(one), transform_of(-2 * one)) == pytest.approx((1, 0))
    assert conflict(transform_of(one), transform_of(other)) == pytest.approx((0, 0))
    halfway = conflict(transform_of(one), transform_of(one + other))
    assert halfway == pytest.approx((math.sqrt(0.5), 2 * math.sqrt(2)))


def test_transforms_of_different_widths_do_not_compare():
    with pytest.raises(ValueError, match="widths 4 and 6"):
        conflict(transform_of(torch.ones(1, 4)), transform_of(torch.ones(2, 3)))


def test_ether_plus_has_turned_by_nothing_at_its_start_and_by_what_it_was_turned_since():
    u = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    start = transform_of(u, -u.clone())
    assert angles_from_start(start).max() < 1e-9
    assert transform_distance(start) < 1e-7
    sideways = torch.zeros(3, 64)
    sideways[:, 0], sideways[:, 1] = -u[:, 1], u[:, 0]
    across = sideways * u.norm(dim=1, keepdim=True) / sideways.norm(dim=1, keepdim=True)  # of u's length, at 90° to it
    wanted = torch.tensor([0.001, 30.0, 90.0], dtype=torch.float64)
    turn = torch.deg2rad(wanted)[:, None]
    angles = angles_from_start(transform_of(u.double(), -(u * turn.cos() + across * turn.sin())))
    assert torch.allclose(angles, wanted, rtol=1e-4)


def test_the_start_of_ether_is_not_invented():
    assert angles_from_start(transform_of(torch.ones(2, 3))) is None
