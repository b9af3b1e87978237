"""Folders of images as data sets: what their metadata or the folder lists is used, whatever the files are called."""

import json
from pathlib import Path

import datasets
import pytest
from helpers.images import gradient

from ether_diffusion.errors import InputError
from ether_diffusion.training.data import find_examples, find_pairs
from ether_diffusion.training.options import ControlDataOptions, InstanceDataOptions

NAMES = ("a.png", "my train.jpg", "b.png", "c.png")

# What `datasets` takes for a split, as the name of an image, or of a file or folder beside the images.
LIKE_SPLITS = ("train.png", "my test.png", "validation_map.png", "dev-1.png", "eval.png", "train-00000-of-00002.png")
BESIDE = ("test/", "train/", "validation/", "validation_map.png", "test.png", "valid.txt", "train.zip", "README.md")


def draw(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        gradient(30 + k, 30).save(folder / name)


def put_beside(folder: Path, name: str) -> None:
    if name.endswith("/"):
        draw(folder / name, ["x.png", "y.png"])
    elif name.endswith(".png"):
        gradient(90, 30).save(folder / name)
    else:
        (folder / name).write_text("x")


def list_pairs(folder: Path, names, kind: str) -> None:
    draw(folder, names)
    draw(folder / "maps", names)
    rows = [{"file_name": n, "conditioning_image": f"maps/{n}", "text": f"image {k}"} for k, n in enumerate(names)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))


def found_pairs(folder: Path, **options) -> list[tuple[str, int, int]]:
    pairs = find_pairs(ControlDataOptions(train_data_dir=str(folder), **options), seed=0)
    count = 4 if options.get("streaming") else len(pairs)
    read = [pairs[number] for number in range(count)]
    return sorted((each.captions[0], each.image.read().width, each.control.read().width) for each in read)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("name", LIKE_SPLITS)
def test_the_rows_of_the_metadata_are_used_whatever_their_images_are_called(tmp_path, name, kind, streaming):
    list_pairs(tmp_path, [*NAMES[:3], name], kind)
    assert found_pairs(tmp_path, streaming=streaming) == [(f"image {k}", 30 + k, 30 + k) for k in range(4)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_the_rows_of_the_metadata_are_used_whatever_lies_beside(tmp_path, caplog, name, streaming):
    caplog.set_level("INFO")
    list_pairs(tmp_path, NAMES, "jsonl")
    put_beside(tmp_path, name)
    assert found_pairs(tmp_path, streaming=streaming) == [(f"image {k}", 30 + k, 30 + k) for k in range(4)]
    (told,) = caplog.messages
    assert told.startswith(f"--train_data_dir {tmp_path}: not read") and name.rstrip("/") in told


@pytest.mark.parametrize("name", [*LIKE_SPLITS, *BESIDE])
def test_the_images_of_a_folder_are_a_data_set_whatever_lies_beside(tmp_path, name):
    draw(tmp_path, NAMES)
    put_beside(tmp_path, name)
    examples = find_examples(InstanceDataOptions(instance_prompt="sks", dataset_name=str(tmp_path)))
    more = [90] if name.endswith(".png") else []
    assert sorted(example.read().width for example in examples) == [30, 31, 32, 33, *more]


def test_pairs_that_the_metadata_names_by_their_files_are_found(tmp_path):
    list_pairs(tmp_path, NAMES, "jsonl")
    file = tmp_path / "metadata.jsonl"
    file.write_text(file.read_text().replace('"conditioning_image"', '"conditioning_image_file_name"'))
    assert len(found_pairs(tmp_path)) == 4


def test_rows_may_lack_what_others_have_and_a_caption_is_counted_where_there_is_one(tmp_path):
    list_pairs(tmp_path, NAMES, "jsonl")
    file = tmp_path / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[0]["text"]
    file.write_text("\n".join(map(json.dumps, [*rows[:3], {**rows[3], "author": "x"}])))
    pairs = find_pairs(ControlDataOptions(train_data_dir=str(tmp_path)), seed=0)
    assert [pair.captions[0] for pair in pairs] == ["", "image 1", "image 2", "image 3"]
    assert pairs.describe() == "4 pairs, 3 with captions"


@pytest.mark.parametrize("layout", ["folders", "tables"])
def test_splits_that_a_data_set_really_has_are_kept(tmp_path, layout):
    for split, count in (("train", 3), ("test", 2)):
        if layout == "folders":
            draw(tmp_path / split, [f"{split}{k}.png" for k in range(count)])
        else:
            gradient().save(tmp_path / "cover.png")
            cell = {"bytes": (tmp_path / "cover.png").read_bytes(), "path": None}
            rows = datasets.Dataset.from_dict({"image": [cell] * count}, datasets.Features(image=datasets.Image()))
            rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    examples = find_examples(InstanceDataOptions(instance_prompt="sks", dataset_name=str(tmp_path)))
    assert len(examples) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png", "text": ["x"]}, {"file_name": "b.png", "text": 3}], "cannot be loaded"),
        ([{"file_name": "a.png", "conditioning_image": 3, "text": "x"}], "--conditioning_image_column .* no images"),
        ([{"file_name": "a.png", "conditioning_image": None, "text": "x"}], "conditioning_image: has no image"),
        ([{"file_name": "a\0.png", "conditioning_image": "a.png", "text": "x"}], "is no path of a file"),
        ([{"file_name": "a.png", "conditioning_image": "a.png", "text": "\ud83d"}], "is no valid Unicode|be loaded"),
        ([{"file_name": "/nowhere/a.png", "conditioning_image": "a.png", "text": "x"}], "there is no such file"),
        ([], "has no rows|has the columns"),
    ],
)
def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path, rows, message):
    draw(tmp_path, NAMES)
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=message):
        find_pairs(ControlDataOptions(train_data_dir=str(tmp_path)), seed=0)


def test_captions_beside_the_images_of_a_data_set_are_named_with_what_is_read(tmp_path, caplog):
    caplog.set_level("INFO")
    draw(tmp_path, NAMES)
    (tmp_path / "a.txt").write_text("a toy")
    find_examples(InstanceDataOptions(instance_prompt="sks", dataset_name=str(tmp_path)))
    where = "(captions come from metadata.jsonl and metadata.csv)"
    assert caplog.messages == [f"--dataset_name {tmp_path}: not read as captions: a.txt {where}"]
