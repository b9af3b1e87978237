"""Images, captions and views: every kind that people have, read right or refused by name."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.images import gradient
from helpers.pipelines import training_images
from hypothesis import given, settings
from hypothesis import strategies as st

from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images
from ether_diffusion.training.data import TrainingImages, examples_of, find_examples
from ether_diffusion.training.data.views import View, center_cut, crop_size, frame, nearest_target, shrunk_size
from ether_diffusion.training.options import InstanceDataOptions


def make(folder: Path, count=3, **options) -> TrainingImages:
    for k in range(count):
        gradient(50 + 10 * k, 30).save(folder / f"{k}.png")
    return training_images(folder, **options)


def test_every_epoch_shows_every_image_once_in_its_own_order(tmp_path):
    images = make(tmp_path, 5)
    orders = [[images.view(5 * epoch + k).image for k in range(5)] for epoch in range(8)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_views_follow_from_seed_and_sample_alone(tmp_path):
    first, again = make(tmp_path, random_flip=True, seed=4), make(tmp_path, random_flip=True, seed=4)
    views = [first.view(s) for s in range(60)]
    assert [again.view(s) for s in reversed(range(60))] == views[::-1]
    other = make(tmp_path, random_flip=True, seed=5)
    assert [other.view(s) for s in range(60)] != views
    assert {v.flip for v in views} == {True, False}
    assert len({(v.image, v.left) for v in views}) > 10


def test_center_crop_and_no_flip_leave_nothing_to_chance(tmp_path):
    images = make(tmp_path, center_crop=True)
    views = [images.view(s) for s in range(30)]
    assert len(set(views)) == 3 and not any(v.flip for v in views)


def test_pixels_are_square_and_from_minus_one_to_one(tmp_path):
    images = make(tmp_path)
    pixels = images.pixels(images.view(0))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1


def test_small_and_long_images_are_fitted(tmp_path):
    gradient(5, 200).save(tmp_path / "a.png")
    images = training_images(tmp_path)
    assert images.pixels(images.view(0)).shape == (3, 16, 16)
    assert center_cut(gradient(7, 90), (16, 16)).size == (16, 16)


# Captions and data sets.


def options(**given) -> InstanceDataOptions:
    return InstanceDataOptions(instance_prompt="a photo of sks toy", **given)


def prompts(**given) -> list[str]:
    return [example.captions[0] for example in find_examples(options(**given))]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        gradient().save(tmp_path / name)
    return tmp_path


def test_a_image_without_a_caption_has_the_instance_prompt(folder):
    assert prompts(instance_data_dir=str(folder)) == ["a photo of sks toy"] * 3


def test_captions_come_from_a_text_file_beside_the_image(folder):
    (folder / "b.txt").write_text("\ufeffsks toy\n on a beach\n", "utf-8")
    (folder / "c.txt").write_text("  \n")
    (folder / "notes.txt").write_text("of no image")
    assert prompts(instance_data_dir=str(folder)) == ["a photo of sks toy", "sks toy on a beach", "a photo of sks toy"]


def test_captions_come_from_metadata_before_text_files(folder):
    rows = [
        {"file_name": "c.png", "text": "third", "short": "3"},
        {"file_name": "a.png", "text": "first", "short": ""},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (folder / "b.txt").write_text("second")
    (folder / "c.txt").write_text("not this")
    assert prompts(instance_data_dir=str(folder)) == ["first", "second", "third"]
    assert prompts(instance_data_dir=str(folder), caption_column="short") == ["a photo of sks toy", "second", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "metadata.jsonl, line 2: is not JSON"),
        ("[]", "line 2: needs an object with a text under 'file_name'"),
        ('{"text": "x"}', "line 2: needs an object with a text under 'file_name'"),
        ('{"file_name": "z.png", "text": "x"}', "line 2: there is no file 'z.png' directly in"),
        ('{"file_name": "../a.png", "text": "x"}', "line 2: there is no file"),
        (
            '{"file_name": "a.png", "caption": "x"}',
            "line 2: needs a text under 'text'; its keys are file_name, caption",
        ),
    ],
)
def test_bad_metadata_names_the_line(folder, line, message):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "b.png", "text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        find_examples(options(instance_data_dir=str(folder)))


def test_a_caption_that_is_no_text_and_a_column_without_metadata_are_refused(folder):
    with pytest.raises(InputError, match="--caption_column short: there is no metadata.jsonl in"):
        find_examples(options(instance_data_dir=str(folder), caption_column="short"))
    (folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="a.txt: cannot be read as UTF-8"):
        find_examples(options(instance_data_dir=str(folder)))


@pytest.fixture
def parquet(tmp_path) -> Path:
    """A data set as the Hub stores them: a folder of Parquet files."""
    images = []
    for k in range(3):
        buffer = io.BytesIO()
        gradient(30 + 10 * k, 30).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    rows = {"photo": images, "caption": ["one", None, "three"], "tags": [["x", "y"], [], ["z"]], "number": [1, 2, 3]}
    features = datasets.Features(
        photo=datasets.Image(),
        caption=datasets.Value("string"),
        tags=datasets.List(datasets.Value("string")),
        number=datasets.Value("int64"),
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    return tmp_path / "set"


def test_a_data_set_gives_images_and_captions(parquet):
    given = {"dataset_name": str(parquet), "image_column": "photo"}
    examples = find_examples(options(**given, caption_column="caption"))
    assert [example.captions for example in examples] == [("one",), ("a photo of sks toy",), ("three",)]
    assert [example.read().size for example in examples] == [(30, 30), (40, 30), (50, 30)]
    assert np.array_equal(np.asarray(examples[1].read()), np.asarray(gradient(40, 30)))
    assert prompts(**given) == ["a photo of sks toy"] * 3
    assert prompts(**given, caption_column="tags") == ["x", "a photo of sks toy", "z"]


def test_a_folder_of_images_is_a_data_set_too(folder):
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{k}.png", "text": f"image {k}"}) for k in "abc")
    )
    examples = find_examples(options(dataset_name=str(folder), caption_column="text"))
    assert sorted(example.captions[0] for example in examples) == ["image a", "image b", "image c"]
    assert all(example.read().size == (40, 30) for example in examples)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--image_column image: --dataset_name .*set has the columns photo, caption, tags, number"),
        ({"image_column": "caption"}, "row 0|--image_column caption: holds"),
        ({"image_column": "number"}, "--image_column number: holds .*int64.*, no images"),
        ({"image_column": "photo", "caption_column": "text"}, "--caption_column text: .* has the columns photo"),
        ({"image_column": "photo", "caption_column": "number"}, "row 0: its number is a int, needs a text"),
        ({"image_column": "photo", "dataset_config_name": "nowhere"}, "cannot be loaded .*nowhere"),
    ],
)
def test_a_data_set_without_what_is_asked_for_says_what_it_has(parquet, given, message):
    with pytest.raises(InputError, match=message):
        find_examples(options(dataset_name=str(parquet), **given))


def test_a_data_set_that_is_not_there_or_has_no_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="--dataset_name .*nowhere: cannot be loaded"):
        find_examples(options(dataset_name=str(tmp_path / "nowhere")))
    datasets.Dataset.from_dict({"image": [None]}, datasets.Features(image=datasets.Image())).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(InputError, match="row 0: has no image"):
        find_examples(options(dataset_name=str(tmp_path)))


# Repeats, fixed crops and buckets.


def test_repeats_lengthen_the_epoch(tmp_path):
    images = make(tmp_path, 3, repeats=4)
    assert len(images) == 12
    shown = [images.view(s).image for s in range(12)]
    assert sorted(shown) == sorted([0, 1, 2] * 4)
    assert len({images.view(s) for s in range(12)}) > 6  # every repeat has its own crop


def test_fixed_crops_come_back_in_every_epoch_and_are_all_listed(tmp_path):
    images = make(tmp_path, 3, repeats=2, random_flip=True, fixed_crops=True)
    listed = set(images.all_views())
    shown = {images.view(s) for s in range(200)}
    assert shown == listed and len(listed) > 6
    assert {v for v in make(tmp_path, 3, fixed_crops=True).all_views()} <= listed


BUCKETS = [(16, 16), (12, 24), (24, 12)]


def test_every_image_goes_to_the_bucket_of_its_shape(tmp_path):
    for k, size in enumerate([(50, 50), (100, 50), (40, 90), (60, 50)]):
        gradient(*size).save(tmp_path / f"{k}.png")
    images = TrainingImages(examples_of(find_images(tmp_path), "x"), targets=BUCKETS)
    assert [images.target(k) for k in range(4)] == [(16, 16), (12, 24), (24, 12), (16, 16)]
    for sample in range(8):
        view = images.view(sample)
        assert images.pixels(view).shape[1:] == images.target(view.image) == images.framing(view).target_size


def test_of_two_buckets_of_one_shape_the_nearer_size_is_taken():
    assert nearest_target((60, 30), [(8, 16), (16, 32), (64, 128)]) == (16, 32)
    assert nearest_target((30, 60), [(16, 16), (16, 32), (32, 16)]) == (32, 16)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_samples_of_one_forward_pass_share_a_bucket_as_far_as_the_images_allow(tmp_path, group):
    for k in range(12):
        gradient(*[(50, 50), (100, 50)][k % 2]).save(tmp_path / f"{k}.png")
    images = TrainingImages(examples_of(find_images(tmp_path), "x"), targets=BUCKETS, group_size=group)
    for epoch in range(4):
        samples = [images.view(12 * epoch + k).image for k in range(12)]
        assert sorted(samples) == list(range(12))
        groups = [{images.target(i) for i in samples[k : k + group]} for k in range(0, 12, group)]
        assert all(len(targets) == 1 for targets in groups)


SIDES = st.integers(1, 300)


@settings(deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.randoms(use_true_random=False))
def test_a_crop_lies_in_its_image_and_has_the_targets_shape(size, target, chance):
    shrunk = shrunk_size(size, target)
    width, height = crop_size(shrunk, target)
    assert 1 <= width <= shrunk[0] <= size[0] and 1 <= height <= shrunk[1] <= size[1]
    rows, columns = target
    if size[0] >= columns and size[1] >= rows:
        assert (width, height) == (columns, rows)
        assert shrunk[0] == columns or shrunk[1] == rows
    else:  # within rounding of whole pixels
        assert abs(width * rows - height * columns) <= max(rows, columns)
    view = View(0, chance.randint(0, shrunk[0] - width), chance.randint(0, shrunk[1] - height), chance.random() < 0.5)
    framing = frame(size, view, target)
    assert framing.target_size == target and min(framing.crop_top_left) >= 0


def test_the_fingerprint_knows_pixels_and_prompts_and_not_places(tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    for each in (first, moved):
        each.mkdir()
        make(each)
    assert training_images(first).fingerprint == training_images(moved).fingerprint
    assert training_images(first, "another").fingerprint != training_images(moved).fingerprint
    gradient(50, 31).save(moved / "0.png")
    assert training_images(first).fingerprint != training_images(moved).fingerprint
