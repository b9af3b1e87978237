"""What `evaluate-control` reads besides images."""

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.commands import evaluate_control
from ether_diffusion.commands import main as cli
from ether_diffusion.commands.evaluate_control import _read_labels
from ether_diffusion.errors import InputError
from ether_diffusion.miniature.control_data import write_control_data


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
            _read_labels(path, 64, False)
        except InputError as error:
            told.add(str(error).splitlines()[0].partition(" (")[0])
    assert told == {f"{path}: cannot be read as an image"}


def test_labels_are_indices_and_not_colours(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "labels.png")
    with pytest.raises(InputError, match="labels.png: is RGB, needs one grey value for each pixel"):
        _read_labels(tmp_path / "labels.png", 4, False)


def test_an_adapter_that_is_not_there_is_told_before_a_image_is_generated(
    tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate_control, "_judge", None)
    monkeypatch.setattr(evaluate_control, "_generate", None)
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    words = ["--base", tiny_pipeline_folder, "--adapter", tmp_path / "nowhere", "--data_dir", folder]
    words += ["--judge", "edges", "--fid_features", "none", "--output_dir", tmp_path / "out"]
    assert cli.main(["evaluate-control", *map(str, words)]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
