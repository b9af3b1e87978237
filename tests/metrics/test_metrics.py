"""Metrics of controlled generation: known answers, a plain reference, and the command from the maps to the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ConvNextConfig, SegformerImageProcessorPil, UperNetConfig, UperNetForSemanticSegmentation

from ether_diffusion import miniature
from ether_diffusion.commands import evaluate_control
from ether_diffusion.commands import main as cli
from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.control.pipelines import EtherControlPipeline
from ether_diffusion.evaluation.features import MiniatureFeatures
from ether_diffusion.metrics import (
    UperNetSegmenter,
    class_iou,
    confusion,
    edge_consistency,
    frechet_distance,
    mean_iou,
    pixel_accuracy,
    sobel_edges,
)
from ether_diffusion.miniature import segmenter
from ether_diffusion.miniature.control_data import HELD_OUT, KINDS, draw_pair, read_label_image, write_control_data
from ether_diffusion.miniature.render import label_image
from ether_diffusion.miniature.segmenter import MiniatureSegmenter, SegmentationNet, SegmenterSettings
from ether_diffusion.miniature.shapes import LABELS
from ether_diffusion.miniature.world import draw_scene

QUICK = SegmenterSettings(steps=12, batch_size=8, renders=24, softened=4, held_out=8)


def maps(*shape: int, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, noise: float = 0.0, seed: str = "fid") -> list[Image.Image]:
    random, found = np.random.default_rng(0), []
    for k in range(count):
        pixels = np.asarray(draw_scene(seed, k).render().image) + noise * random.standard_normal((64, 64, 3))
        found.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return found


# Segmentation ---------------------------------------------------------------------------------------------------


def test_equal_maps_have_every_score_at_one_and_disjoint_maps_at_zero():
    truth = maps(2, 8, 8)
    assert mean_iou(confusion(truth, truth, 5)) == pixel_accuracy(confusion(truth, truth, 5)) == 1
    wrong = (truth + 1) % 5
    assert mean_iou(confusion(wrong, truth, 5)) == pixel_accuracy(confusion(wrong, truth, 5)) == 0


def test_a_half_right_map_has_the_scores_that_are_counted_by_hand():
    counts = confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), 2)
    assert counts.tolist() == [[2, 1], [0, 1]] and counts.dtype == torch.int64
    assert class_iou(counts).tolist() == pytest.approx([2 / 3, 1 / 2])
    assert mean_iou(counts) == pytest.approx(7 / 12) and pixel_accuracy(counts) == 3 / 4


def test_classes_that_nothing_has_are_left_out_and_those_only_predicted_count_as_zero():
    truth = torch.zeros(4, dtype=torch.uint8)
    assert mean_iou(confusion(truth, truth, 150)) == 1
    assert mean_iou(confusion(torch.tensor([0, 0, 0, 7]), truth, 150)) == pytest.approx(3 / 4 / 2)


@pytest.mark.parametrize("ignored", [255, -1, 3])
def test_ignored_pixels_count_nowhere(ignored):
    truth, predicted = torch.tensor([0, 1, ignored, ignored]), torch.tensor([0, 1, 0, 2])
    assert torch.equal(confusion(predicted, truth, 4, ignored), confusion(predicted[:2], truth[:2], 4))


@settings(max_examples=60, deadline=None)
@given(classes=st.integers(1, 6), seed=st.integers(0, 999), ignored=st.sampled_from([None, 0, 255]))
def test_scores_are_those_of_a_plain_reference_and_counts_add_up(classes, seed, ignored):
    predicted, truth = maps(3, 4, 5, classes=classes, seed=seed), maps(3, 4, 5, classes=classes, seed=seed + 1000)
    if ignored == 255:
        truth[0, 0] = 255
    counts = confusion(predicted, truth, classes, ignored)
    assert torch.equal(counts, sum(confusion(p, t, classes, ignored) for p, t in zip(predicted, truth, strict=True)))
    p, t = predicted.numpy(), truth.numpy()
    counted = np.ones_like(t, bool) if ignored is None else t != ignored
    if not counted.any():
        return
    ious = []
    for c in range(classes):
        named, is_c = (p == c) & counted, (t == c) & counted
        if (named | is_c).any():
            ious.append((named & is_c).sum() / (named | is_c).sum())
    assert mean_iou(counts) == pytest.approx(np.mean(ious))
    assert pixel_accuracy(counts) == pytest.approx((p == t)[counted].mean())


def test_what_cannot_be_counted_is_an_error_that_says_what_fits():
    truth = maps(4)
    for predicted, wrong, message in (
        (maps(5), truth, r"predicted \(5,\), truth \(4,\)"),
        (maps(4).float(), truth, "predicted is torch.float32"),
        (truth + 5, truth, "predicted has the index [5-9], needs 0 to 4"),
        (truth, torch.full((4,), 255), "truth has the index 255, needs 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(predicted, wrong, 5)
    for score in (mean_iou, pixel_accuracy):
        with pytest.raises(ValueError, match="no pixels were counted"):
            score(torch.zeros(5, 5, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"\(5,\), need \(classes, classes\)"):
            score(torch.zeros(5))


@pytest.fixture(scope="module")
def upernet_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("upernet")
    backbone = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=7
    )
    UperNetForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_upernet_from_a_folder_names_every_pixel_at_the_size_of_the_images(upernet_folder):
    judge = UperNetSegmenter(str(upernet_folder))
    shown = [image.resize((48, 32)) for image in images(3)]
    named = judge(shown)
    assert judge.classes == len(judge.names) == 7
    assert named.shape == (3, 32, 48) and named.dtype == torch.int64 and 0 <= named.min() <= named.max() < 7
    assert torch.equal(named[1:2], judge(shown[1:2])), "an image's map depends on its batch"


# Edges ----------------------------------------------------------------------------------------------------------


def test_edges_of_a_image_are_consistent_with_themselves():
    image = images(1)[0]
    own = Image.fromarray(sobel_edges(image).numpy())
    assert edge_consistency(image, own) == 1
    assert edge_consistency(image, Image.new("L", image.size)) == 0
    assert edge_consistency(Image.new("RGB", image.size), Image.new("L", image.size)) == 1


def test_edges_may_be_off_by_the_tolerance_and_no_further():
    def line(x: int) -> tuple[Image.Image, Image.Image]:
        pixels = np.zeros((32, 32), np.uint8)
        pixels[:, x:] = 255
        edges = np.zeros((32, 32), np.uint8)
        edges[:, x - 1 : x + 1] = 255
        return Image.fromarray(pixels), Image.fromarray(edges)

    image, own = line(16)
    assert np.array_equal(sobel_edges(image).numpy() * 255, np.asarray(own))
    assert edge_consistency(image, own, tolerance=0) == 1
    assert edge_consistency(image, line(17)[1]) == 1
    assert edge_consistency(image, line(18)[1]) == pytest.approx(0.5)
    assert edge_consistency(image, line(20)[1]) == 0
    with pytest.raises(ValueError, match=r"\(32, 32\), its edge map \(8, 8\)"):
        edge_consistency(image, own.resize((8, 8)))


def test_edges_between_colours_of_one_brightness_are_seen():
    red, green = np.array([150, 0, 0]), np.array([0, 76, 0])
    pixels = np.where(np.arange(16)[None, :, None] < 8, red, green).repeat(16, 0).astype(np.uint8)
    assert sobel_edges(Image.fromarray(pixels)).sum() == 32


# Sets of images -----------------------------------------------------------------------------------------------


def test_the_distance_of_a_set_to_itself_is_nothing_and_grows_with_noise():
    pytest.importorskip("torchmetrics")
    features = MiniatureFeatures()
    real = images(64)
    distances = [frechet_distance(images(64, noise), real, features=features) for noise in (0, 20, 60)]
    assert abs(distances[0]) < 1e-2 < distances[1] < distances[2]


def test_the_distance_is_that_of_its_formula():
    pytest.importorskip("torchmetrics")
    linalg = pytest.importorskip("scipy.linalg")

    class Corners(torch.nn.Module):
        num_features = 3

        def forward(self, pixels):
            return pixels[:, :, 0, 0].float() / 255

    ours, theirs = images(40), images(50, seed="others")
    (mean, cov), (mean_2, cov_2) = (
        (values.mean(0), np.cov(values.T))
        for values in (np.stack([np.asarray(i)[0, 0] for i in s]) / 255.0 for s in (ours, theirs))
    )
    wanted = ((mean - mean_2) ** 2).sum() + np.trace(cov + cov_2 - 2 * linalg.sqrtm(cov @ cov_2).real)
    assert frechet_distance(ours, theirs, features=Corners()) == pytest.approx(wanted, rel=1e-4)


def test_images_of_several_sizes_can_be_compared():
    pytest.importorskip("torchmetrics")
    shown = images(4)
    mixed = [image.resize((96, 96)) if k % 2 else image for k, image in enumerate(shown)]
    assert frechet_distance(mixed, shown, features=MiniatureFeatures()) >= -1e-3


def test_a_distance_that_cannot_be_had_says_what_is_needed():
    with pytest.raises(ValueError, match="got 'clip', needs 'inception' or a module"):
        frechet_distance(images(2), images(2), features="clip")
    with pytest.raises(ValueError, match="got 1 images and 2 references, needs two of each"):
        frechet_distance(images(1), images(2))


# The miniature's judge and data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_judge(tmp_path_factory) -> tuple[Path, MiniatureSegmenter]:
    folder = tmp_path_factory.mktemp("judge")
    return folder, MiniatureSegmenter.load_or_train(folder, QUICK)


def test_a_judge_is_trained_once_for_its_settings(quick_judge):
    folder, judge = quick_judge
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns
    again = MiniatureSegmenter.load_or_train(folder, QUICK)
    assert again.record == judge.record and file.stat().st_mtime_ns == before
    shown = images(3)
    assert torch.equal(judge(shown), again(shown)) and judge(shown).shape == (3, 64, 64)
    assert replace(QUICK, seed=1).fingerprint() != QUICK.fingerprint()
    with pytest.raises(ValueError, match=r"got images of \(32, 32\), needs 64"):
        judge([Image.new("RGB", (32, 32))])


def test_a_judge_is_trained_alike_every_time_and_disturbs_no_random_state(quick_judge):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    again = segmenter.train_segmenter(QUICK)
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in quick_judge[1].net.state_dict().items():
        assert torch.equal(tensor, again.net.state_dict()[name]), name


def test_the_judges_net_is_small_and_its_cells_are_its_pixels():
    torch.manual_seed(0)
    net = SegmentationNet().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) < 1e6
    pixels = torch.rand(1, 3, 64, 64)
    whole, cells = net(pixels), net.head(net.cells(pixels)).unflatten(-1, (-1, 4))  # (1, 32, 32, k, 4)
    assert torch.equal(whole[0, :, 11, 40], cells[0, 5, 20, :, 2])


@pytest.mark.slow
def test_the_judge_knows_its_world(tmp_path):
    judge = MiniatureSegmenter.load_or_train(tmp_path)
    assert judge.record["held_out_renders"]["pixel_accuracy"] > 0.97
    assert judge.record["held_out_softened"]["pixel_accuracy"] > 0.96


def test_a_map_of_colours_tells_its_classes():
    for k in range(5):
        pair = draw_pair("colours", k)
        assert np.array_equal(read_label_image(pair.control), pair.labels)
    every = Image.fromarray(np.arange(len(LABELS), dtype=np.uint8)[None])
    assert np.array_equal(read_label_image(label_image(every)), every)
    with pytest.raises(ValueError, match="#010203 is the colour of no class"):
        read_label_image(Image.new("RGB", (4, 4), (1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_control_data_is_a_folder_that_training_reads(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write_control_data(tmp_path / "data", 3, "t", kind)
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 3 and {"image", "conditioning_image", "text"} <= set(rows.column_names)
    pair = draw_pair("t", 1, kind)
    assert rows[1]["text"] == pair.caption
    assert np.array_equal(rows[1]["image"], pair.image)
    assert np.array_equal(Image.open(folder / rows[1]["conditioning_image"]), pair.control)
    with pytest.raises(FileExistsError, match="name another folder"):
        write_control_data(folder, 3, "t", kind)


def test_outlines_lie_on_the_borders_of_their_circles():
    pairs = [draw_pair("t", k, "circles") for k in range(20)]
    assert min(edge_consistency(pair.image, pair.control) for pair in pairs) > 0.9
    assert all(pair.caption.count("circle") in (1, 2, 3) for pair in pairs)


# The command ----------------------------------------------------------------------------------------------------


def evaluate(*words: object) -> int:
    return cli.main(["evaluate-control", *map(str, words)])


@pytest.fixture
def encoder_file(tiny_pipeline_folder, tmp_path) -> Path:
    """An encoder that nothing was taught, for the tiny pipeline."""
    pipe = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.add_control("default", ControlEncoder.for_unet(pipe.unet, pipe.vae_scale_factor))
    pipe.save_ether_weights(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_is_evaluated_by_a_upernet(encoder_file, upernet_folder, tiny_pipeline_folder, tmp_path, capsys):
    folder = write_control_data(tmp_path / "data", 3, "t")
    given = ("--base", tiny_pipeline_folder, "--adapter", encoder_file, "--data_dir", folder, "--max_samples", 2)
    given += ("--num_inference_steps", 2, "--judge", upernet_folder, "--fid_features", "none")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    unlabelled = [{k: v for k, v in json.loads(line).items() if k != "labels"} for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, unlabelled)))
    assert evaluate(*given, "--output_dir", tmp_path / "one") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["count"] == 2 and report["judge"]["truth"] == "the judge on the real images"
    assert report["scores"]["real"] == {"mean_iou": 1, "pixel_accuracy": 1}
    # An encoder that was taught nothing changes no image.
    assert report["scores"]["with_control"] == report["scores"]["without_control"]
    assert evaluate(*given, "--batch_size", 1, "--output_dir", tmp_path / "two") == 0
    sheets = [np.asarray(Image.open(tmp_path / name / "sheet.png"), int) for name in ("one", "two")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1, "the size of a batch changes the noise"
    assert Image.open(tmp_path / "one" / "sheet.png").size == (2 * 18, 4 * 18)


def test_a_controlnet_is_evaluated_by_edges(tiny_pipeline, tiny_pipeline_folder, tmp_path, capsys):
    net = ControlNetModel.from_unet(tiny_pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    net.save_pretrained(tmp_path / "controlnet")
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    given = ("--base", tiny_pipeline_folder, "--adapter", tmp_path / "controlnet", "--data_dir", folder)
    given += ("--num_inference_steps", 2, "--judge", "edges", "--fid_features", "none")
    assert evaluate(*given, "--output_dir", tmp_path / "out") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]
    assert scores["with_control"] == scores["without_control"] and 0 <= scores["with_control"]["edge_f1"] <= 1


def test_labels_that_start_at_one_are_reduced(tmp_path):
    Image.fromarray(np.array([[0, 1], [150, 255]], np.uint8)).save(tmp_path / "a.png")
    assert evaluate_control._read_labels(tmp_path / "a.png", 2, True).tolist() == [[255, 0], [149, 255]]
    assert evaluate_control._read_labels(tmp_path / "a.png", 2, False).tolist() == [[0, 1], [150, 255]]


def test_what_cannot_be_evaluated_is_told_in_one_line(encoder_file, tiny_pipeline_folder, tmp_path, capsys):
    folder = write_control_data(tmp_path / "data", 2, "t")
    usual = ("--adapter", encoder_file, "--output_dir", tmp_path / "out")
    based = (*usual, "--base", tiny_pipeline_folder, "--judge", "edges", "--fid_features", "none")
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


def test_the_miniature_is_evaluated_from_its_maps_to_the_report(tmp_path, quick_judge, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(evaluate_control.MiniatureSegmenter, "load_or_train", lambda folder: quick_judge[1])
    pipe = EtherControlPipeline.from_pretrained(miniature.FOLDER)
    pipe.add_control("default", ControlEncoder.for_unet(pipe.unet, pipe.vae_scale_factor))
    pipe.save_ether_weights(tmp_path / "adapter")
    given = ("--miniature", 4, "--adapter", tmp_path / "adapter", "--num_inference_steps", 2)
    assert evaluate(*given, "--output_dir", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"] == f"miniature, {HELD_OUT!r}" and report["base"] == "miniature"
    assert report["judge"]["truth"] == "labels" and report["fid_features"] == "miniature"
    assert set(report["scores"]) == {"real", "with_control", "without_control"}
    assert set(report["scores"]["with_control"]) == {"mean_iou", "pixel_accuracy", "fid"}
