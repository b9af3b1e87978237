"""`inspect`: every number against the file, every line against the numbers."""

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import zoo
from helpers.oracle import dense, unit
from helpers.pipelines import adapt, open_pipeline
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.commands import inspect as command
from ether_diffusion.errors import EtherFileError


def inspect(capsys, *arguments) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))
    return capsys.readouterr().out


def inspect_json(capsys, *arguments) -> dict:
    return json.loads(inspect(capsys, *arguments, "--json"))


@pytest.fixture
def file(trained, tmp_path) -> Path:
    return trained.save_ether_weights(tmp_path / "dog", metadata={"prompt": "a photo of sks dog"})


def test_inspect_tells_what_the_file_holds_and_loads_no_model(trained, file, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    report = inspect_json(capsys, file)
    vectors = trained.ether_state_dict()
    assert report["file"] == str(file)
    assert report["file_bytes"] == file.stat().st_size
    assert report["parameters"] == sum(vector.numel() for vector in vectors.values())
    assert (report["prompt"], report["format_version"], report["base_model"]) == ("a photo of sks dog", 1, "tiny")
    assert set(report["versions"]) == {"ether-diffusion", "diffusers", "peft", "torch", "transformers"}
    assert (report["fit"], report["against"]) == (None, None)
    config = trained.unet.peft_config["default"]
    assert {part["component"] for part in report["components"]} == {"unet", "text_encoder"}
    for part in report["components"]:
        own = {key: vector for key, vector in vectors.items() if key.startswith(part["component"] + ".")}
        assert (part["method"], part["sides"], part["num_blocks"]) == (config.method, config.sides, 2)
        assert part["layers"] == len({key.rpartition(".")[0] for key in own})
        assert part["parameters"] == sum(vector.numel() for vector in own.values())
        assert part["bytes"] == 4 * part["parameters"]
        assert part["dtypes"] == ["float32"]


def test_every_side_of_every_layer_has_its_numbers(trained, file, capsys):
    vectors = trained.ether_state_dict()
    rows = inspect_json(capsys, file)["layers"]
    assert len(rows) == sum(key.rpartition(".")[2].startswith("ether_u") for key in vectors)
    for row in rows:
        end = "_out" if row["side"] == "output" else ""
        stem = f"{row['component']}.{row['path']}"
        raws = [vectors[k] for k in (f"{stem}.ether_u{end}", f"{stem}.ether_v{end}") if k in vectors]
        change = dense(*raws) - torch.eye(row["width"], dtype=torch.float64)
        assert row["distance"] == pytest.approx(torch.linalg.matrix_norm(change).item(), abs=1e-6)
        assert (row["num_blocks"], row["parameters"]) == (2, len(raws) * row["width"])
        if len(raws) == 1:
            assert row["angle"] is None
        else:
            angles = torch.rad2deg((unit(raws[0]) * unit(raws[1])).sum(-1).abs().arccos())
            assert row["angle"]["mean"] == pytest.approx(angles.mean().item())
            assert row["angle"]["max"] == pytest.approx(angles.max().item())


def test_the_summary_is_short_and_the_layers_come_when_asked_for(trained, file, capsys):
    summary, full = inspect(capsys, file).splitlines(), inspect(capsys, file, "--layers").splitlines()
    assert len(summary) < 12
    assert "prompt      a photo of sks dog" in summary
    assert any(line.startswith("unet") and "ETHER" in line for line in summary)
    rows = [line for line in full if "attn1.to_q " in line]
    expected = {"ether": 1, "ether_plus": 2}[trained.unet.peft_config["default"].method]
    assert len(rows) == expected * sum(name.endswith("attn1.to_q") for name, _ in trained.unet.named_modules())
    assert all(("–" in row) == (expected == 1) for row in rows)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda pipe: None, "fits, same weights"),
        (lambda pipe: pipe.to(torch.bfloat16), "fits, same weights"),
        (lambda pipe: next(iter(pipe.unet.parameters())).data.add_(1), "fits, same weights"),  # not an adapted layer
        (
            lambda pipe: pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.add_(1),
            "fits, other weights",
        ),
    ],
)
def test_a_base_that_fits_is_told_from_its_weights(file, tiny_pipeline_folder, tmp_path, capsys, change, verdict):
    base = open_pipeline(tiny_pipeline_folder)
    change(base)
    base.save_pretrained(tmp_path / "base")
    report = inspect_json(capsys, file, "--base", tmp_path / "base")
    assert report["fit"] == {"base": str(tmp_path / "base"), "verdict": verdict, "error": None}
    assert f"{verdict} on {tmp_path / 'base'}" in inspect(capsys, file, "--base", tmp_path / "base")


def test_a_base_of_another_architecture_is_explained(file, wider_pipeline_folder, capsys):
    fit = inspect_json(capsys, file, "--base", wider_pipeline_folder)["fit"]
    assert fit["verdict"] == "does not fit"
    assert "inputs and needs (2, 12)" in fit["error"] and WEIGHTS_NAME in fit["error"]
    assert fit["error"] in inspect(capsys, file, "--base", wider_pipeline_folder)


def test_weights_that_the_file_does_not_know_are_not_called_the_same(file, tiny_pipeline_folder, tmp_path, capsys):
    checkpoint = read_adapter_file(file)
    del checkpoint.metadata["base_fingerprint"]["unet"]
    write_adapter_file(tmp_path / "partly.safetensors", checkpoint)
    fit = inspect_json(capsys, tmp_path / "partly.safetensors", "--base", tiny_pipeline_folder)["fit"]
    assert fit["verdict"] == "fits, weights cannot be compared"


def test_a_conflict_is_shown_on_every_layer_that_both_adapters_have(tiny_pipeline_folder, tmp_path, capsys):
    ours = adapt(open_pipeline(tiny_pipeline_folder), "ether", seed=1, num_blocks=2).save_ether_weights(tmp_path / "a")
    theirs = read_adapter_file(
        adapt(open_pipeline(tiny_pipeline_folder), "ether_plus", seed=2, num_blocks=4).save_ether_weights(
            tmp_path / "b"
        )
    )
    del theirs.configs["text_encoder"], theirs.tensors["text_encoder"]
    path = next(key.removesuffix(".ether_u") for key in theirs.tensors["unet"] if key.endswith(".ether_u"))
    mine = read_adapter_file(ours).tensors["unet"][f"{path}.ether_u"]
    theirs.tensors["unet"][f"{path}.ether_u"] = mine.reshape(4, -1).clone()  # the same vector, cut in halves
    write_adapter_file(tmp_path / "c.safetensors", theirs)
    report = inspect_json(capsys, ours, "--against", tmp_path / "c.safetensors")
    against, layers = report["against"], [row for row in report["layers"] if row["component"] == "unet"]
    assert against["file"] == str(tmp_path / "c.safetensors")
    assert {(row["component"], row["path"], row["side"]) for row in against["conflicts"]} == {
        ("unet", row["path"], "input") for row in layers
    }
    strengths = [row["alignment"] for row in against["conflicts"]]
    assert strengths == sorted(strengths, reverse=True)
    row = next(row for row in against["conflicts"] if row["path"] == path)
    a = dense(mine)
    b = dense(*(theirs.tensors["unet"][f"{path}.{name}"] for name in ("ether_u", "ether_v")))
    assert row["commutator"] == pytest.approx(torch.linalg.matrix_norm(a @ b - b @ a).item())
    assert row["alignment"] > math.sqrt(0.5)  # one of the halves holds at least half of the vector
    text = inspect(capsys, ours, "--against", tmp_path / "c.safetensors", "--layers")
    assert f"{len(layers)} sides of layers in common" in text
    assert "alignment  commutator" in text


def test_an_adapter_against_itself_clashes_fully_and_commutes(file, capsys):
    conflicts = inspect_json(capsys, file, "--against", file)["against"]["conflicts"]
    assert conflicts
    assert all(row["alignment"] == pytest.approx(1) and row["commutator"] < 1e-6 for row in conflicts)


def test_adapters_of_other_widths_are_not_compared(file, wider_pipeline_folder, tmp_path, capsys):
    other = adapt(open_pipeline(wider_pipeline_folder)).save_ether_weights(tmp_path / "wide")
    with pytest.raises(EtherFileError, match="is not as in .* widths 16 and 24"):
        inspect(capsys, file, "--against", other)


def test_a_folder_of_peft_gets_its_component_from_the_base(file, tiny_pipeline_folder, tmp_path, capsys):
    unet = open_pipeline(tiny_pipeline_folder).unet
    get_peft_model(unet, EtherConfig(num_blocks=2)).save_pretrained(tmp_path / "peft")
    report = inspect_json(capsys, tmp_path / "peft")
    assert [part["component"] for part in report["components"]] == [None]
    assert report["file_bytes"] == (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size
    assert "a folder of PEFT" in inspect(capsys, tmp_path / "peft", "--layers")
    with pytest.raises(ValueError, match="peft does not say which component it adapts; --base tells"):
        inspect(capsys, file, "--against", tmp_path / "peft")
    with_base = inspect_json(capsys, tmp_path / "peft", "--against", file, "--base", tiny_pipeline_folder)
    assert [part["component"] for part in with_base["components"]] == ["unet"]
    assert with_base["fit"]["verdict"] == "fits, weights cannot be compared"
    assert {row["component"] for row in with_base["against"]["conflicts"]} == {"unet"}
    swapped = inspect_json(capsys, file, "--against", tmp_path / "peft", "--base", tiny_pipeline_folder)
    assert len(swapped["against"]["conflicts"]) == len(with_base["against"]["conflicts"])


def test_a_prompt_cannot_write_to_the_terminal(tmp_path, capsys):
    vectors = {"unet": {"a.ether_u": torch.ones(1, 4)}}
    checkpoint = AdapterFile({"unet": EtherConfig()}, vectors, {"prompt": "\x1b[2J\n" + "x" * 5000})
    write_adapter_file(tmp_path / WEIGHTS_NAME, checkpoint)
    lines = inspect(capsys, tmp_path).splitlines()
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert any(line.startswith(r"prompt      \x1b[2J\nxxx") for line in lines)


def test_a_file_that_cannot_be_loaded_is_not_described(tmp_path, capsys):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EtherFileError, match="model.safetensors .*holds no ETHER adapter"):
        inspect(capsys, tmp_path / "model.safetensors")
    assert capsys.readouterr().out == ""


# Weights that were trained as a whole ---------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "alone"])
@pytest.mark.parametrize(
    ("kind", "component", "words"),
    [
        ("light", "control_encoder", r"control encoder, channels 3-\d+(-\d+)*-16, nearest"),
        ("controlnet", "controlnet", ", ".join(zoo.STEM)),
    ],
)
def test_weights_that_were_trained_as_a_whole_are_shown(
    tiny_pipeline_folder, tmp_path, capsys, kind, component, words, vectors
):
    path = zoo.save_control(kind, tiny_pipeline_folder, tmp_path, vectors=vectors)
    tensors = load_file(path)
    whole = {name: t for name, t in tensors.items() if not name.rpartition(".")[2].startswith("ether_")}
    report = inspect_json(capsys, path)
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert [part["component"] for part in report["components"]] == (
        [{"light": "unet", "controlnet": "controlnet"}[kind]] if vectors else []
    )
    (entry,) = report["weights"]
    count = sum(tensor.numel() for tensor in whole.values())
    assert entry | read_adapter_file(path).weights[component].about == entry
    assert (entry["component"], entry["tensors"], entry["parameters"]) == (component, len(whole), count)
    assert (entry["bytes"], entry["dtypes"]) == (4 * count, ["float32"])
    text = inspect(capsys, path)
    assert re.search(rf"^{component} +{words} +{len(whole)} +{count:,} +{4 * count:,}$", text, re.MULTILINE)
    assert ("method" in text) == vectors


def test_an_adapter_without_such_weights_has_none_to_show(file, capsys):
    assert inspect_json(capsys, file)["weights"] == []
    assert "as a whole" not in inspect(capsys, file)


@pytest.mark.parametrize("kind", ["light", "controlnet"])
def test_the_fit_of_control_is_told_from_a_stock_pipeline(
    tiny_pipeline_folder, wider_pipeline_folder, tmp_path, capsys, kind
):
    path = zoo.save_control(kind, tiny_pipeline_folder, tmp_path / "both")
    fit = inspect_json(capsys, path, "--base", tiny_pipeline_folder)["fit"]
    assert (fit["verdict"], fit["error"]) == ("fits, same weights", None)
    assert inspect_json(capsys, path, "--base", wider_pipeline_folder)["fit"]["verdict"] == "does not fit"
    alone = zoo.save_control(kind, tiny_pipeline_folder, tmp_path / "alone", vectors=False)
    fit = inspect_json(capsys, alone, "--base", tiny_pipeline_folder)["fit"]
    assert fit["verdict"] == "fits, weights cannot be compared"  # there are no adapted ones


@pytest.mark.parametrize("kind", ["light", "controlnet"])
def test_the_fit_of_control_for_sdxl_is_told_as_well(tiny_pipeline, tiny_pipeline_folder, tmp_path, capsys, kind):
    zoo.sdxl(tiny_pipeline).save_pretrained(tmp_path / "xl")
    path = zoo.save_control(kind, tmp_path / "xl", tmp_path / "adapter")
    assert inspect_json(capsys, path, "--base", tmp_path / "xl")["fit"]["verdict"] == "fits, same weights"
    assert inspect_json(capsys, path, "--base", tiny_pipeline_folder)["fit"]["verdict"] == "does not fit"
