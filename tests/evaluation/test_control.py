"""`evaluate-control`, from the maps to the report, and what keeps it from starting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import ControlNetModel
from helpers.evaluators import QUICK, save_upernet
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.commands import main as cli
from ether_diffusion.control.classes import EtherControlPipeline
from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.evaluation import control
from ether_diffusion.miniature.control_data import HELD_OUT, write_control_data
from ether_diffusion.miniature.segmenter import train_segmenter


def evaluate(*words: object) -> int:
    return cli.main(["evaluate-control", *map(str, words)])


@pytest.fixture
def encoder_file(tiny_pipeline_folder, tmp_path) -> Path:
    """An encoder that nothing was taught, for the tiny pipeline."""
    pipe = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.add_control("default", ControlEncoder.for_denoiser(pipe.unet, pipe.vae_scale_factor))
    pipe.save_ether_weights(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_is_evaluated_by_a_upernet(encoder_file, tiny_pipeline_folder, tmp_path, capsys):
    folder = write_control_data(tmp_path / "data", 3, "t")
    given = ("--base", tiny_pipeline_folder, "--adapter", encoder_file, "--data_dir", folder, "--max_samples", 2)
    given += ("--num_inference_steps", 2, "--evaluator", save_upernet(tmp_path / "upernet"), "--fid_features", "none")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    unlabelled = [{k: v for k, v in json.loads(line).items() if k != "labels"} for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    assert evaluate(*given, "--output_dir", tmp_path / "one") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["count"] == 2 and report["judge"]["truth"] == "the evaluator on the real images"
    assert report["scores"]["real"] == {"mean_iou": 1, "pixel_accuracy": 1}
    # An encoder that was taught nothing changes no image.
    assert report["scores"]["with_control"] == report["scores"]["without_control"]
    assert evaluate(*given, "--batch_size", 1, "--output_dir", tmp_path / "two") == 0
    sheets = [np.asarray(Image.open(tmp_path / name / "sheet.png"), int) for name in ("one", "two")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1, "the size of a batch changes the noise"
    assert Image.open(tmp_path / "one" / "sheet.png").size == (2 * (128 + 8) + 8, 4 * (128 + 40))


def test_a_controlnet_is_evaluated_by_edges(tiny_pipeline, tiny_pipeline_folder, tmp_path, capsys):
    net = ControlNetModel.from_unet(tiny_pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    net.save_pretrained(tmp_path / "controlnet")
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    given = ("--base", tiny_pipeline_folder, "--adapter", tmp_path / "controlnet", "--data_dir", folder)
    given += ("--num_inference_steps", 2, "--evaluator", "edges", "--fid_features", "none")
    assert evaluate(*given, "--output_dir", tmp_path / "out") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]
    assert scores["with_control"] == scores["without_control"] and 0 <= scores["with_control"]["edge_f1"] <= 1


def test_what_cannot_be_evaluated_is_told_in_one_line(encoder_file, tiny_pipeline_folder, tmp_path, capsys):
    folder = write_control_data(tmp_path / "data", 2, "t")
    usual = ("--adapter", encoder_file, "--output_dir", tmp_path / "out")
    based = (*usual, "--base", tiny_pipeline_folder, "--evaluator", "edges", "--fid_features", "none")
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(folder, tmp_path / "broken") / "metadata.jsonl"
    lines = broken.read_text().splitlines()

    def told(*words: object) -> str:
        assert evaluate(*words) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "--base: missing" in told(*usual, "--data_dir", folder)
    assert "has no metadata.jsonl" in told(*based, "--data_dir", tmp_path / "empty")
    assert "64 pixels a side, and those of --base 16" in told(*based, "--miniature", 2)
    one = ("--data_dir", folder, "--max_samples", 1)
    assert "got 1 image, needs two" in told(*based, *one, "--fid_features", "miniature")
    assert f"{tmp_path / 'nowhere'}" in told(*based, *one, "--adapter", tmp_path / "nowhere")
    broken.write_text(lines[0] + '\n{"file_name": "000001.png"}\n')
    assert "line 2: has no text under conditioning_image, text" in told(*based, "--data_dir", broken.parent)
    row = json.loads(lines[1])
    del row["labels"]
    broken.write_text(lines[0] + "\n" + json.dumps(row))
    assert "line 2 has no labels; all or none need them" in told(*based, "--data_dir", broken.parent)
    broken.write_text(json.dumps(row | {"labels": 2}))
    assert "line 1: got labels=2, needs the path of an image" in told(*based, "--data_dir", broken.parent)


def test_an_adapter_that_is_not_there_is_told_before_an_image_is_generated(
    tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(control, "make_evaluator", None)
    monkeypatch.setattr(control, "_generate", None)
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    words = ["--base", tiny_pipeline_folder, "--adapter", tmp_path / "nowhere", "--data_dir", folder]
    words += ["--evaluator", "edges", "--fid_features", "none", "--output_dir", tmp_path / "out"]
    assert cli.main(["evaluate-control", *map(str, words)]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_miniature_is_evaluated_from_its_maps_to_the_report(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    segmenter = train_segmenter(QUICK)
    monkeypatch.setattr(control.MiniatureSegmenter, "load_or_train", lambda folder: segmenter)
    pipe = EtherControlPipeline.from_pretrained(miniature.FOLDER)
    pipe.add_control("default", ControlEncoder.for_denoiser(pipe.unet, pipe.vae_scale_factor))
    pipe.save_ether_weights(tmp_path / "adapter")
    given = ("--miniature", 4, "--adapter", tmp_path / "adapter", "--num_inference_steps", 2)
    assert evaluate(*given, "--output_dir", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"] == f"miniature, {HELD_OUT!r}" and report["base"] == "miniature"
    assert report["judge"]["truth"] == "labels" and report["fid_features"] == "miniature"
    assert set(report["scores"]) == {"real", "with_control", "without_control"}
    assert set(report["scores"]["with_control"]) == {"mean_iou", "pixel_accuracy", "fid"}
