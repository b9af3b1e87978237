"""Labels that control is evaluated against, as files."""

import numpy as np
import pytest
from helpers import control_data
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.evaluation.samples import read_labels, read_samples


def test_damaged_labels_are_told_in_one_sentence_whatever_the_damage(tmp_path):
    path = tmp_path / "labels.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 150, (64, 64), dtype=np.uint8)).save(path)
    whole, told = path.read_bytes(), set()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:33],
        b"",
        *(whole[:k] + bytes([whole[k] ^ 0xFF]) + whole[k + 1 :] for k in range(0, len(whole), 101)),
    ):
        path.write_bytes(damaged)
        try:
            read_labels(path, 64, False)
        except InputError as error:
            told.add(str(error).splitlines()[0].partition(" (")[0])
    assert told == {f"{path}: is not an image that can be read", f"{path}: the image is truncated or damaged"}


def test_labels_are_indices_and_not_colours(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "labels.png")
    with pytest.raises(InputError, match="labels.png: is RGB, needs one grey value for each pixel"):
        read_labels(tmp_path / "labels.png", 4, False)


def test_labels_that_start_at_one_are_reduced(tmp_path):
    Image.fromarray(np.array([[0, 1], [150, 255]], np.uint8)).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", 2, True).tolist() == [[255, 0], [149, 255]]
    assert read_labels(tmp_path / "a.png", 2, False).tolist() == [[0, 1], [150, 255]]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_caption_may_hold_what_only_some_take_for_the_end_of_a_line(tmp_path, separator):
    control_data.write(tmp_path / "data", sizes=((20, 20),))
    index = tmp_path / "data" / "metadata.jsonl"
    index.write_text(index.read_text().replace("image 0", f"an{separator}image"), "utf-8")
    (sample,) = read_samples(tmp_path / "data", 16)
    assert sample.text == f"an{separator}image"
