"""Data that cannot be used: found before a training, however stored; what is found later ends with a checkpoint."""

import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from helpers.control_data import label_map, write
from helpers.scripts import CONTROLNET, in_process, launch, refusal, same
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.training import control
from ether_diffusion.training.checkpoint_files import find_checkpoints
from ether_diffusion.training.data import TrainingImages, examples_of, find_pairs
from ether_diffusion.training.data.checking import BLOCK, check_all
from ether_diffusion.training.options import ControlDataOptions

COUNT = 48
COLUMNS = ("image", "conditioning_image")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def truncated(kind: str) -> Callable[[Image.Image], bytes]:
    return lambda image: encoded(image, kind)[: len(encoded(image, kind)) * 2 // 3]


def not_finite(image: Image.Image) -> bytes:
    values = np.full(image.size[::-1], 0.5, np.float32)
    values[3, 4] = np.nan
    return encoded(Image.fromarray(values), "TIFF")


def text_too_long(image: Image.Image) -> bytes:
    """A PNG with a compressed text of 2 MB after its pixels."""
    content, text = encoded(image, "PNG"), b"zTXt" + b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return content[:-12] + chunk + content[-12:]


FAULTS = {
    "a truncated PNG": (truncated("PNG"), "the image is truncated or damaged"),
    "a truncated JPEG": (truncated("JPEG"), "the image is truncated or damaged"),
    "a truncated WebP": (truncated("WEBP"), "."),
    "a truncated TIFF": (truncated("TIFF"), "."),
    "an empty file": (lambda image: b"", "is not an image that can be read"),
    "a page": (lambda image: b"<html>404</html>", "is not an image that can be read"),
    "another shape": (lambda image: encoded(image.resize((90, 20)), "PNG"), "the two need one shape"),
    "values that are not finite": (not_finite, "holds values that are not finite"),
    "a long text": (text_too_long, "carries more text than is read with an image"),
    "nothing": (lambda image: None, "there is no such file|has no image"),
}


def folder_with(folder: Path, column: str, content: bytes | None) -> dict:
    """Pairs in files, of which the last one is bad."""
    write(folder, [(40, 30)] * COUNT)
    bad = folder / ("" if column == "image" else "maps") / f"{COUNT - 1}.png"
    bad.unlink() if content is None else bad.write_bytes(content)
    return {"train_data_dir": str(folder)}


def table_with(folder: Path, column: str, content: bytes | None) -> dict:
    """The same in a table that holds the images themselves."""
    good = encoded(label_map(40, 30), "PNG")
    cells = {name: [{"bytes": good, "path": None}] * COUNT for name in COLUMNS}
    cells[column] = [*cells[column][:-1], None if content is None else {"bytes": content, "path": None}]
    features = datasets.Features({name: datasets.Image() for name in COLUMNS} | {"text": datasets.Value("string")})
    folder.mkdir()
    rows = datasets.Dataset.from_dict({**cells, "text": ["a map"] * COUNT}, features)
    rows.to_parquet(folder / "train.parquet")
    return {"dataset_name": str(folder)}


@pytest.mark.parametrize("stored", [folder_with, table_with])
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_pair_of_many_is_found_before_a_training(tmp_path, fault, column, stored):
    make, message = FAULTS[fault]
    given = stored(tmp_path / "data", column, make(label_map(40, 30)))
    with pytest.raises(InputError, match=f"row {COUNT - 1}.*({message})"):
        find_pairs(ControlDataOptions(**given), seed=0)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("another shape", "nothing")])
def test_one_bad_image_of_many_is_found_before_a_training(tmp_path, fault):
    make, message = FAULTS[fault]
    write(tmp_path / "data")
    (tmp_path / "data" / "3.png").write_bytes(make(label_map(40, 30)))
    with pytest.raises(InputError, match=f"3.png: .*({message})"):
        examples_of(sorted((tmp_path / "data").glob("*.png")), "a map")


def test_all_bad_pairs_are_named_at_once(tmp_path):
    folder = write(tmp_path / "data", [(40, 30)] * 6)
    for number in (1, 4):
        (folder / f"{number}.png").unlink()
    with pytest.raises(InputError, match="row 1, image 1.png: there is no such file; 1 more cannot be used: row 4$"):
        find_pairs(ControlDataOptions(train_data_dir=str(folder)), seed=0)


def test_a_check_keeps_the_order_of_more_numbers_than_wait_at_a_time():
    count = 2 * BLOCK + 3
    assert check_all(lambda number: -number, str, count) == [-number for number in range(count)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_that_a_file_shows_is_that_of_the_image_that_is_read(tmp_path, kind, orientation):
    folder = write(tmp_path / "data", [(40, 30)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in (folder / "0.png", folder / "maps" / "0.png"):
        label_map(50, 20).save(path, kind, exif=exif)
    pairs = find_pairs(ControlDataOptions(train_data_dir=str(folder)), seed=0)
    assert pairs.sizes == [pairs[0].read().size]
    images = TrainingImages(pairs, targets=[(16, 16), (24, 12), (12, 24)], interpolation="lanczos")
    view = images.view(0)
    assert np.abs(images.pixels(view).numpy() - (images.control(view).numpy() * 2 - 1)).max() < 1e-6


# In a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(bases, tmp_path):
    """Control training of a data folder: train(folder, *flags, output=…) -> (result, output folder)."""
    usual = {"--pretrained_model_name_or_path": bases["sd"], "--num_validation_images": 0, "--max_train_steps": 5}
    call = in_process(control.main, {**usual, "--train_batch_size": 1, "--control_lr": 0.05}, tmp_path)
    return lambda folder, *flags, **more: call("--train_data_dir", folder, *flags, **more)


def spoil(path: Path) -> None:
    """Damage that only decoding shows: the chunks of a PNG stay whole, with pixels that make no sense."""
    content = path.read_bytes()
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    chunk = b"IDAT" + b"\xff" * length
    checksum = struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:start] + chunk + checksum + content[start + len(chunk + checksum) :])


def end_of(capsys, call: Callable, *flags: object) -> str:
    """The last line of a run that ends with an error of the user's, after what libraries say."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*flags)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in told
    return told.strip().splitlines()[-1]


def turn(folder: Path, place: int, **options) -> int:
    """The row that comes at a place of the training."""
    data = ControlDataOptions(train_data_dir=str(folder), **options)
    images = TrainingImages(find_pairs(data, seed=0), targets=[(16, 16)])
    view = images.view(place)
    return int(images.prompt(view, place).split()[-1])


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--gradient_accumulation_steps", 2)])
def test_data_that_fail_in_their_turn_leave_a_checkpoint_and_repaired_data_go_on(
    train, tmp_path, capsys, flags, column
):
    folder = write(tmp_path / "data")
    _, whole = train(folder, *flags, output="whole")
    accumulated = 2 if "--gradient_accumulation_steps" in flags else 1
    place = 3
    bad = f"{turn(folder, place, streaming='--streaming' in flags)}.png"
    path = folder / bad if column == "image" else folder / "maps" / bad
    shutil.copy(path, tmp_path / "good.png")
    spoil(path)
    told = end_of(capsys, train, folder, *flags)
    step = place // accumulated
    assert f", {column} " in told and "the image is truncated or damaged" in told
    assert f"stopped after step {step} of 5, saved as" in told and "--resume_with_changed data" in told
    assert [number for number, _ in find_checkpoints(tmp_path / "out")] == [step]
    shutil.copy(tmp_path / "good.png", path)
    _, resumed = train(folder, *flags, "--resume_from_checkpoint", "latest", "--resume_with_changed", "data")
    assert same(whole, resumed)


@pytest.mark.parametrize("fault", ["a truncated PNG", "another shape", "nothing"])
def test_a_bad_pair_stops_a_run_before_any_weights_are_read(train, tmp_path, capsys, monkeypatch, fault):
    given = folder_with(tmp_path / "data", "conditioning_image", FAULTS[fault][0](label_map(40, 30)))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    assert f"row {COUNT - 1}" in refusal(capsys, train, given["train_data_dir"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_of_two_processes_neither_waits_where_the_data_of_one_fail(bases, tmp_path):
    folder = write(tmp_path / "data", [(40, 30)] * 8)
    place = 5  # of the second process, which has every other sample
    spoil(folder / f"{turn(folder, place)}.png")
    flags = ["--pretrained_model_name_or_path", bases["sd"], "--train_data_dir", folder, "--train_batch_size", 1]
    flags += ["--num_validation_images", 0, "--max_train_steps", 8, "--output_dir", tmp_path / "out"]
    done = launch(CONTROLNET, *flags, processes=2)
    assert done.returncode != 0 and "error: " in done.stderr and "stopped after step 2 of 8" in done.stderr
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [2]


# Changed data that are meant --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(train, tmp_path) -> Path:
    """A data folder on which a run has saved a step, whose images are others since."""
    folder = write(tmp_path / "data")
    train(folder, "--max_train_steps", 1, "--checkpointing_steps", 1)
    label_map(40, 30, 77).save(folder / "0.png")
    return folder


@pytest.mark.parametrize("meant", [("data",), ("train_data_dir",), ("class_data_dir", "train_data_dir")])
@pytest.mark.parametrize("extended", [False, True])
def test_changed_data_that_are_meant_go_on(train, stopped, meant, extended):
    if extended:
        label_map(40, 30, 78).save(stopped / "4.png")
        with (stopped / "metadata.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"file_name": "4.png", "conditioning_image": "4.png", "text": "image 4"}))
    flags = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest", "--resume_with_changed", *meant)
    assert len(train(stopped, *flags)[0].losses) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--train_data_dir: was 'sha256:.*add --resume_with_changed data"),
        (("--resume_with_changed", "class_data_dir"), "--train_data_dir: was 'sha256:"),
        (("--resume_with_changed", "data", "--seed", 3), "--seed: was 0"),
        (("--resume_with_changed", "seed"), r"--resume_with_changed: got \('seed',\), needs data, or names of flags"),
    ],
)
def test_other_changes_are_refused_as_before(train, stopped, capsys, flags, message):
    told = refusal(capsys, train, stopped, "--max_train_steps", 2, "--resume_from_checkpoint", "latest", *flags)
    assert re.search(message, told)


def test_changed_data_are_nothing_to_speak_of_without_a_checkpoint(train, tmp_path, capsys):
    told = refusal(capsys, train, write(tmp_path / "data"), "--resume_with_changed", "data")
    assert "--resume_with_changed: has no effect without --resume_from_checkpoint" in told
