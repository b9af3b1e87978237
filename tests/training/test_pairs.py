"""Pairs for control training: columns, streams, and one crop and flip for both images."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.control_data import COLOURS, label_map, write
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.training.data import TrainingImages, find_pairs
from ether_diffusion.training.options import ControlDataOptions


def images(folder: Path, *, targets=((16, 16),), seed=0, **options) -> TrainingImages:
    data = {name: options.pop(name) for name in ("streaming", "max_train_samples") if name in options}
    pairs = find_pairs(ControlDataOptions(train_data_dir=str(folder), **data), seed=seed)
    return TrainingImages(pairs, targets=targets, seed=seed, **options)


def recaption(folder: Path, caption: Callable[[int], object]) -> Path:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "text": caption(number)} for number, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"center_crop": True}, {"random_flip": True}, {"targets": [(16, 24), (24, 16)]}]
)
def test_image_and_control_image_get_the_same_crop_and_flip(tmp_path, options):
    shown = images(write(tmp_path / "data"), interpolation="lanczos", **options)
    for sample in range(16):
        view = shown.view(sample)
        np.testing.assert_allclose(shown.pixels(view), shown.control(view) * 2 - 1, atol=1e-6)
        assert shown.control(view).shape[1:] == shown.framing(view).target_size


@pytest.mark.parametrize("scale", [1, 3])
def test_label_maps_come_to_size_without_new_classes(tmp_path, scale):
    folder = write(tmp_path / "data", map_scale=scale)
    known = {tuple(colour) for colour in COLOURS.tolist()}

    def seen(interpolation: str) -> set:
        shown = images(folder, interpolation=interpolation, random_flip=True)
        controls = [shown.control(shown.view(sample)) for sample in range(12)]
        return {tuple(pixel) for c in controls for pixel in (c * 255).round().int().flatten(1).T.tolist()}

    assert seen("nearest") <= known
    assert not seen("lanczos") <= known


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_control_images_of_another_mode_are_read_as_rgb(tmp_path, mode):
    folder = write(tmp_path / "data")
    before = images(folder)
    wanted = [before.control(before.view(sample)) for sample in range(4)]
    for path in (folder / "maps").iterdir():
        Image.open(path).convert(mode).save(path)
    after = images(folder)
    for sample, control in enumerate(wanted):
        np.testing.assert_array_equal(after.control(after.view(sample)), control)


def test_captions_belong_to_their_images_and_some_are_left_out(tmp_path):
    folder = write(tmp_path / "data")
    shown = images(folder)
    for sample in range(8):
        view = shown.view(sample)
        assert shown.prompt(view, sample) == f"image {view.image}"
    part = images(folder, proportion_empty_prompts=0.25)
    empty = sum(part.prompt(part.view(s), s) == "" for s in range(400))
    assert 70 < empty < 130
    assert part.prompts == ["", *shown.prompts] and len(shown.prompts) == 4


def test_of_several_captions_each_is_drawn(tmp_path):
    folder = recaption(write(tmp_path / "data"), lambda number: [f"image {number}", "another"])
    shown = images(folder)
    drawn = {shown.prompt(shown.view(s), s) for s in range(40)}
    assert "another" in drawn and "image 0" in drawn


def test_the_first_rows_alone_are_used(tmp_path):
    shown = images(write(tmp_path / "data"), max_train_samples=2)
    assert len(shown) == 2 and {shown.view(s).image for s in range(20)} == {0, 1}


def test_a_stream_is_read_in_order_again_and_again_and_from_anywhere(tmp_path):
    folder = write(tmp_path / "data")

    def captions(samples, **options) -> list[str]:
        shown = images(folder, streaming=True, **options)
        return [shown.prompt(shown.view(s), s) for s in samples]

    first = captions(range(12))
    assert all(sorted(first[k : k + 4]) == [f"image {n}" for n in range(4)] for k in (0, 4, 8))
    assert captions(range(12)) == first and captions(range(7, 12)) == first[7:]
    assert captions([5, 3, 11]) == [first[k] for k in (5, 3, 11)]
    assert captions(range(12), seed=1) != first
    assert set(captions(range(8), max_train_samples=2)) == {"image 0", "image 1"}
    with pytest.raises(TypeError, match="no length"):
        len(images(folder, streaming=True).examples)


def test_the_fingerprint_knows_captions_and_images(tmp_path):
    folder = write(tmp_path / "data")
    before = images(folder).fingerprint
    assert images(folder).fingerprint == before
    assert images(Path(shutil.copytree(folder, tmp_path / "moved"))).fingerprint == before
    label_map(64, 64, 9).save(tmp_path / "moved" / "maps" / "2.png")
    assert images(tmp_path / "moved").fingerprint != before
    recaption(folder, lambda number: "another" if number == 2 else f"image {number}")
    later = time.time() + 10  # datasets tells a changed file by its time, which some disks keep in seconds
    os.utime(folder / "metadata.jsonl", (later, later))
    assert images(folder).fingerprint != before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"image_column": "photo"},
            "--image_column photo: --train_data_dir .* has the columns image, cond",
        ),
        ({"conditioning_image_column": "map"}, "--conditioning_image_column map: .* has the columns image, cond"),
        ({"caption_column": "words"}, "--caption_column words: .* has the columns image, conditioning_image, text"),
        (
            {"conditioning_image_column": "map", "streaming": True},
            "--conditioning_image_column map: .* has the columns image, cond",
        ),
        (
            {"dataset_config_name": None, "train_data_dir": "nowhere"},
            "--train_data_dir nowhere: there is no such folder",
        ),
    ],
)
def test_a_column_that_is_missing_is_named_with_those_that_exist(tmp_path, given, message):
    folder = write(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        find_pairs(ControlDataOptions(**{"train_data_dir": str(folder), **given}), seed=0)


def test_a_control_image_of_another_shape_or_damaged_is_named(tmp_path):
    folder = write(tmp_path / "data")
    label_map(64, 20).save(folder / "maps" / "0.png")
    shape = r"row \d: the control image has 64x20 pixels and the image 40x30; the two"
    with pytest.raises(InputError, match=shape):
        images(folder)
    shown = images(folder, streaming=True)
    with pytest.raises(InputError, match=shape):
        [shown.control(shown.view(sample)) for sample in range(4)]
    (folder / "maps" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="row 0, conditioning_image maps/0.png: is not an image"):
        images(folder)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    folder = recaption(write(tmp_path / "data"), lambda number: number)
    with pytest.raises(InputError, match="row 0: its text is a int, needs a text or a list of texts"):
        images(folder, max_train_samples=1).view(0)
