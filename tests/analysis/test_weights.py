"""The analysis of weights: every figure against its dense definition or a known answer, and `analyze` against both."""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from helpers.oracle import dense_weight
from helpers.pipelines import open_pipeline
from peft import HRAConfig, LoraConfig, OFTConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.analysis import effect
from ether_diffusion.analysis.report import describe
from ether_diffusion.analysis.weights import (
    adapted_weights,
    angle_between,
    energy_change,
    hyperspherical_energy,
    weight_distance,
)
from ether_diffusion.commands import analyze as command
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.tuner.model import ATTENTION
from ether_diffusion.tuner.transforms import Vectors

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


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
def test_the_energy_of_a_wide_layer_needs_no_matrix_of_all_pairs_and_takes_seconds(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measuring import LiveBytes

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


# The command ----------------------------------------------------------------------------------------------------


def analyze(capsys, *arguments) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))
    return capsys.readouterr().out


@pytest.fixture
def file(trained, tmp_path) -> Path:
    return trained.save_ether_weights(tmp_path / "dog")


def test_analyze_measures_every_layer_and_writes_what_it_found(trained, file, tiny_pipeline_folder, tmp_path, capsys):
    shown = analyze(capsys, file, "--base", tiny_pipeline_folder, "--output_dir", tmp_path / "a", "--scale", 0.5)
    report = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert (tmp_path / "a" / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "a" / "analysis.png") in shown and "fits, same weights" in shown
    assert (report["strength"], report["fit"], report["against"]) == (0.5, "fits, same weights", None)
    trained.set_adapters(["default"], [0.5])
    weights = {
        f"{component}.{path}": (before, after)
        for component in ("unet", "text_encoder")
        for path, before, after in adapted_weights(getattr(trained, component))
    }
    assert len(report["layers"]) == len(weights)
    sides = {(row["component"], row["path"], row["side"]): row for row in describe(file)["layers"]}
    for row in report["layers"]:
        path = f"{row['component']}.{row['path']}"
        before, after = next(weights[name] for name in (path, path.replace("text_model.", "")) if name in weights)
        assert row["weight_distance"] == pytest.approx((after - before).norm().item(), rel=1e-4)
        assert row["relative_distance"] == pytest.approx(row["weight_distance"] / before.norm().item())
        assert row["energy"] == pytest.approx(hyperspherical_energy(before))
        assert row["energy_change"] == pytest.approx(energy_change(before, after), abs=1e-6)
        assert row["half_space_energy_change"] == pytest.approx(
            energy_change(before, after, half_space=True), abs=1e-6
        )
        for side, figures in row["sides"].items():
            held = sides.pop((row["component"], row["path"], side))
            assert (figures["distance"], figures["angle"]) == (held["distance"], held["angle"])
            assert (figures["alignment"], figures["commutator"]) == (None, None)
    assert not sides


def test_an_adapter_clashes_with_itself_in_every_layer(file, tiny_pipeline_folder, capsys):
    report = effect.analyze(file, base=tiny_pipeline_folder, against=file)
    for side in itertools.chain.from_iterable(row["sides"].values() for row in report["layers"]):
        assert side["alignment"] == pytest.approx(1) and side["commutator"] == pytest.approx(0, abs=1e-6)
    assert "alignment, input" in analyze(capsys, file, "--base", tiny_pipeline_folder, "--against", file)


def test_adapters_without_a_layer_in_common_are_not_compared(tiny_pipeline_folder, tmp_path):
    for name in ("to_q", "to_k"):
        pipe = open_pipeline(tiny_pipeline_folder)
        pipe.unet.add_adapter(EtherConfig(target_modules=[name]))
        pipe.save_ether_weights(tmp_path / name)
    with pytest.raises(InputError, match="--against: .*to_k adapts no layer that .*to_q does"):
        effect.analyze(tmp_path / "to_q", base=tiny_pipeline_folder, against=tmp_path / "to_k")


def test_a_lora_is_measured_by_its_weights_alone(tiny_pipeline, tiny_pipeline_folder, tmp_path, capsys):
    torch.manual_seed(0)
    tiny_pipeline.unet.add_adapter(
        LoraConfig(target_modules=ATTENTION, r=2, lora_alpha=2, init_lora_weights=False), "style"
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(tiny_pipeline.unet, adapter_name="style"))
    type(tiny_pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers)
    wanted = {path: (after - before).norm().item() for path, before, after in adapted_weights(tiny_pipeline.unet)}
    report = effect.analyze(tmp_path, base=tiny_pipeline_folder)
    assert {row["path"]: row["weight_distance"] for row in report["layers"]} == pytest.approx(wanted, rel=1e-4)
    assert all(row["sides"] == {} and row["component"] == "unet" for row in report["layers"])
    out = tmp_path / "out"
    shown = analyze(capsys, tmp_path, "--base", tiny_pipeline_folder, "--output_dir", out)
    assert "‖T − I‖" not in shown and (out / "analysis.png").is_file()
    with pytest.raises(InputError, match="--against: compares adapters of ETHER"):
        effect.analyze(tmp_path, base=tiny_pipeline_folder, against=tmp_path)


def test_a_lora_for_another_base_is_refused(wider_pipeline_folder, tiny_pipeline_folder, tmp_path):
    pipe = open_pipeline(wider_pipeline_folder)
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, r=2), "style")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers)
    with pytest.raises(InputError, match="pytorch_lora_weights.safetensors: is no LoRA for"):
        effect.analyze(tmp_path, base=tiny_pipeline_folder)


def test_what_cannot_be_analysed_is_said_in_one_sentence_and_nothing_is_written(
    file, wider_pipeline_folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    with pytest.raises(EtherFileError, match="made for another architecture"):
        analyze(capsys, file, "--base", wider_pipeline_folder, "--output_dir", out)
    with pytest.raises(InputError, match="--scale: got nan, needs a finite number"):
        analyze(capsys, file, "--scale", "nan", "--output_dir", out)
    with pytest.raises(InputError, match=r"--output_dir .*safetensors: is a file, needs a folder"):
        analyze(capsys, file, "--output_dir", file)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        analyze(capsys, tmp_path / "nothing", "--output_dir", out)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the package matplotlib is missing"):
        analyze(capsys, tmp_path / "nothing", "--output_dir", out)
    assert not out.exists() and os.listdir(tmp_path) == ["dog"]
