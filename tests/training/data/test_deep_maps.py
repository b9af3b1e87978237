"""Control training on maps of more than 8 bits: one range from the flag to the file and the card."""

from pathlib import Path

import numpy as np
import pytest
from helpers.control import content
from helpers.control_data import write
from helpers.scripts import in_process, refusal
from PIL import Image

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.training import control
from ether_diffusion.training.data import find_pairs
from ether_diffusion.training.options import ControlDataOptions, parse_range


@pytest.fixture
def train(bases, tmp_path):
    usual = {"--pretrained_model_name_or_path": bases["sd"], "--num_validation_images": 0, "--max_train_steps": 1}
    call = in_process(control.main, {**usual, "--train_data_dir": tmp_path / "data"}, tmp_path)
    return call


def deep(folder: Path, dtype, white: float) -> Path:
    """Pairs whose maps are ramps of 12 or 16 bits, or of floats, each up to another value."""
    write(folder)
    for k, path in enumerate(sorted((folder / "maps").iterdir())):
        width, height = Image.open(path).size
        ramp = np.linspace(0, white * (k + 1) / 4, width)[None].repeat(height, 0)
        Image.fromarray(ramp.astype(dtype)).save(path, "TIFF")
    return folder


@pytest.mark.parametrize(
    ("dtype", "white", "stated"),
    [(np.uint16, 65535, None), (np.uint16, 4095, "0,4095"), (np.float32, 1, None), (np.float32, 10, "0,10")],
)
def test_all_maps_of_a_data_set_have_one_scale(tmp_path, dtype, white, stated):
    folder = deep(tmp_path / "data", dtype, white)
    pairs = find_pairs(ControlDataOptions(train_data_dir=str(folder)), seed=0, value_range=parse_range(stated))
    brightest = [np.asarray(pair.control.read()).max() for pair in pairs]
    assert np.abs(np.array(brightest) - [64, 128, 191, 255]).max() <= 1


@pytest.mark.parametrize("kind", ["light", "controlnet"])
def test_the_range_goes_from_the_flag_to_the_file_and_the_card(train, tmp_path, kind):
    deep(tmp_path / "data", np.uint16, 4095)
    _, folder = train("--control_type", kind, "--conditioning_range", "0,4095")
    card = (folder / "README.md").read_text()
    assert 'control.png", value_range=(0.0, 4095.0))' in card and "load_image" not in card
    if kind == "light":
        encoder = content(folder / WEIGHTS_NAME)[0]["weights"]["control_encoder"]
        assert encoder["config"]["value_range"] == [0.0, 4095.0]


def test_validation_images_are_read_with_the_range_too(train, tmp_path):
    deep(tmp_path / "data", np.float32, 10)
    flags = ("--conditioning_range", "0,10", "--validation_image", tmp_path / "data" / "maps" / "3.png")
    _, folder = train(*flags, "--validation_prompt", "a map", "--num_validation_images", 1, "--num_inference_steps", 1)
    assert (folder / "grid.png").is_file()  # without the range, the map would be refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "row 0, conditioning_image maps/0.png: holds values from 0 to 2.5; of mode F, 0 to 1 fit"),
        (("--conditioning_range", "10,0"), "--conditioning_range: got '10,0', needs two finite numbers as low,high"),
        (("--conditioning_range", "0"), "--conditioning_range: got '0', needs two finite numbers as low,high"),
        (("--conditioning_range", "0,inf"), "--conditioning_range: got '0,inf', needs two finite numbers"),
        (("--conditioning_range", "black,white"), "--conditioning_range: got 'black,white', needs two finite"),
    ],
)
def test_a_range_that_does_not_fit_is_one_sentence(train, tmp_path, capsys, flags, message):
    deep(tmp_path / "data", np.float32, 10)
    assert message in refusal(capsys, train, *flags)
