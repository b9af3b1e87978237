"""Commands on the miniature of a transformer, by its name."""

import json

import pytest
from diffusers import StableDiffusion3Pipeline
from helpers.evaluators import QUICK
from helpers.miniature_dit import save_own_adapter
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.base_models import MINIATURES, open_pipeline
from ether_diffusion.commands import main as cli
from ether_diffusion.evaluation import control
from ether_diffusion.miniature.segmenter import train_segmenter

BASE = ("--base", "miniature-dit")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with one adapter, "own"."""
    folder = tmp_path_factory.mktemp("adapters")
    save_own_adapter(folder)
    return folder


def call(*words: object) -> int:
    return cli.main([*map(str, words)])


def test_inspect_knows_its_weights(adapters, capsys):
    assert call("inspect", adapters / "own", *BASE) == 0
    printed = capsys.readouterr().out
    assert "fits, same weights" in printed and "ether-diffusion miniature-dit" in printed
    assert call("inspect", adapters / "own", "--base", "miniature") == 0
    assert "does not fit" in capsys.readouterr().out


def test_analyze_measures_its_layers(adapters, capsys, tmp_path):
    assert call("analyze", adapters / "own", *BASE, "--output_dir", tmp_path) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert report["base"] == "the miniature-dit" and {row["component"] for row in report["layers"]} == {"transformer"}


def test_generate_writes_an_image_with_an_adapter(adapters, capsys, tmp_path):
    words = ("--adapters", adapters, "--adapter", "own", "--prompt", "a toy", "--steps", 2, "--output_dir", tmp_path)
    assert call("generate", *BASE, *words, "--max_batch", 1) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.size == (64, 64)


def test_export_and_merge_leave_what_stock_pipelines_load(adapters, tmp_path):
    given = (*BASE, "--adapter", adapters / "own", "--output_dir")
    assert call("export", "--to", "diffusers-lora", *given, tmp_path / "lora") == 0
    miniature.load_pipeline("dit").load_lora_weights(tmp_path / "lora")
    assert call("merge", *given, tmp_path / "merged") == 0
    assert type(open_pipeline(tmp_path / "merged")) is StableDiffusion3Pipeline


@pytest.mark.slow
@pytest.mark.parametrize("base", MINIATURES)
def test_the_quickstart_of_control_goes_from_maps_to_scores(base, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchmetrics")
    segmenter = train_segmenter(QUICK)
    monkeypatch.setattr(control.MiniatureSegmenter, "load_or_train", lambda folder: segmenter)
    words = ("--pairs", 4, "--held_out", 3, "--max_train_steps", 2, "--train_batch_size", 2)
    words += ("--num_validation_images", 0)
    assert call("quickstart", "--control", "--base", base, "--output_dir", tmp_path, *words) == 0
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["base"] == base and set(report["scores"]) == {"real", "with_control", "without_control"}
    # In this order: the report, the sheet, the evaluator that was trained for them.
    written = [tmp_path / "evaluation" / "report.json", tmp_path / "evaluation" / "sheet.png"]
    assert capsys.readouterr().out.splitlines()[-3:-1] == list(map(str, written))
