"""Settings of a request, and images that carry them."""

import json

import pytest
from PIL import Image

from ether_diffusion.demo.settings import LARGEST_MAP, Settings, read_image, save_image
from ether_diffusion.errors import InputError


def test_an_image_carries_its_settings(tmp_path):
    settings = Settings(prompt="ein Bär", adapters=(("toy-1", 0.5),), seed=7, width=96)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    assert read_image(tmp_path / "a.png") == (settings, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: holds no settings"):
        read_image(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(InputError, match="c.png: is not a PNG image"):
        read_image(tmp_path / "c.png")
    with pytest.raises(InputError, match="cannot be read"):
        Settings.from_json(json.dumps({"prompt": "a", "os": "rm"}))


def test_an_image_carries_its_map_within_bounds(tmp_path):
    settings, board = Settings(prompt="a map", adapters=(("scene-map", 1.0),)), Image.new("RGBA", (9, 7), "teal")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings, board)
    found, control = read_image(tmp_path / "a.png")
    assert found == settings and control.size == (9, 7) and control.tobytes() == board.tobytes()
    save_image(Image.new("RGB", (8, 8)), tmp_path / "b.png", settings, Image.new("L", (LARGEST_MAP + 1, 1)))
    with pytest.raises(InputError, match="b.png: the map in it has 2049×1 pixels; 2048 a side at most fit"):
        read_image(tmp_path / "b.png")


def test_whole_numbers_may_come_as_floats():
    settings = Settings(prompt="a", steps=25.0, seed=3.0)
    assert settings == Settings(prompt="a", steps=25, seed=3) and isinstance(settings.steps, int)
    with pytest.raises(InputError, match="Steps: got 2.5, needs a whole number from 1 to 150"):
        Settings(prompt="a", steps=2.5)
