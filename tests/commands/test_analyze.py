"""`analyze`: every figure against the weights, and what cannot be analysed."""

import argparse
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from helpers.pipelines import open_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ether_diffusion import EtherConfig
from ether_diffusion.analysis import effect
from ether_diffusion.analysis.report import describe
from ether_diffusion.analysis.weights import adapted_weights, energy_change, hyperspherical_energy
from ether_diffusion.commands import analyze as command
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.tuner.model import ATTENTION


def analyze(capsys, *arguments) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))
    return capsys.readouterr().out


def save_lora(pipe, folder: Path) -> None:
    """Put a random LoRA on the pipeline's UNet, and its file into the folder."""
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, r=2, lora_alpha=2, init_lora_weights=False), "style")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)


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
    save_lora(tiny_pipeline, tmp_path)
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
    save_lora(open_pipeline(wider_pipeline_folder), tmp_path)
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
