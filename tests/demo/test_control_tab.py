"""Generating under a map, as clients of the page's API do it."""

import json

import gradio_client
import numpy as np
import pytest
from helpers.demo import STEPS
from PIL import Image

from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo import maps
from ether_diffusion.demo.library import Library
from ether_diffusion.demo.settings import read_image
from ether_diffusion.errors import InputError
from ether_diffusion.miniature.control_data import class_colours
from ether_diffusion.training.control_classes import KEY, colours_of, parse_classes


def control(client, prompt: str, drawn: object, *, seed: int = 5, name: str = "scene-map"):
    """Status, address, preview, gallery, slider, map, seed."""
    return client.predict(name, prompt, drawn, 1.0, seed, STEPS, 5.0, 64, 64, False, 1, api_name="/control")


def editor(path) -> dict:
    file = gradio_client.handle_file(path)
    return {"background": file, "layers": [], "composite": file}


def test_a_controlled_image_brings_its_map_back(server, client):
    start = client.predict("scene-map", api_name="/sample_map")
    drawn = start[2]
    assert start[1] and Image.open(drawn["composite"]).size == (512, 512)
    said, _, _, gallery, *_ = control(client, start[1], editor(drawn["composite"]))
    base, steered = (each["image"] for each in gallery)
    settings, found = read_image(steered)
    assert "Done" in said and settings.seed == 5 and read_image(base)[1] is None
    *_, last = server.worker.generate(settings, control=found)
    assert np.array_equal(np.asarray(Image.open(steered)), np.asarray(last.images[0][1]))
    restored = client.predict(gradio_client.handle_file(steered), api_name="/use_map")
    assert restored[0] == "scene-map" and restored[4] == 5 and "settings and the map" in restored[-1]
    assert Image.open(restored[2]["composite"]).convert("RGBA").tobytes() == found.tobytes()
    refused = client.predict(gradio_client.handle_file(steered), api_name="/use_settings")
    assert "was generated under a map; drop it in the tab Control" in refused[-1]
    refused = client.predict(gradio_client.handle_file(base), api_name="/use_map")
    assert "was generated without a map; drop it in the tab Generate" in refused[-1]
    with pytest.raises(Exception, match="Map: is empty"):
        control(client, "a heart", None)


def test_what_is_drawn_on_a_cleared_canvas_steers_as_on_the_background(client, tmp_path):
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[16:48, 16:48] = (*bytes.fromhex(class_colours()["heart"][1:]), 255)
    Image.fromarray(drawing).save(tmp_path / "clear.png")
    on_black = drawing.copy()
    on_black[..., 3] = 255
    Image.fromarray(on_black).save(tmp_path / "black.png")
    on_white = np.where(drawing[..., 3:] == 0, 255, drawing).astype(np.uint8)
    Image.fromarray(on_white).save(tmp_path / "white.png")
    clear, black, white = (
        np.asarray(Image.open(control(client, "a heart", editor(tmp_path / f"{name}.png"))[3][1]["image"]))
        for name in ("clear", "black", "white")
    )
    assert np.array_equal(clear, black) and not np.array_equal(clear, white)


def test_the_ground_is_filled_and_what_is_drawn_on_it_stays(client, tmp_path):
    board = Image.new("RGB", (8, 8), "#000000")
    board.paste("#ff0000", (2, 2, 4, 4))
    board.save(tmp_path / "map.png")
    filled, _ = client.predict(editor(tmp_path / "map.png"), "#17f20d", "scene-map", api_name="/fill_map")
    with Image.open(filled["composite"]) as image:
        assert sorted(image.convert("RGB").getcolors()) == [(4, (255, 0, 0)), (60, (0x17, 0xF2, 0x0D))]


def test_classes_are_those_of_the_file_or_of_the_sample_map(tmp_path):
    (shipped,) = (each for each in Library(SHIPPED).adapters() if each.is_control)
    _, sample = read_image(shipped.image)
    assert maps.classes_of(shipped, sample) == class_colours()
    assert maps.background_of(maps.classes_of(shipped, sample)) == "#000000"
    own = Image.new("RGB", (4, 4), "#101010")
    own.putpixel((0, 0), (255, 0, 0))
    assert maps.classes_of(shipped, own) == {"#101010": "#101010", "#ff0000": "#ff0000"}
    assert maps.classes_of(shipped, None) == {}
    assert colours_of(Image.fromarray(np.arange(3 * 128, dtype=np.uint8).reshape(1, 128, 3))) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "cannot be read"),
        ("{}", "needs a JSON object of 1 to 64 names and colours"),
        (json.dumps({"sky": "blue"}), "needs a JSON object"),
        (json.dumps({"sky": 7}), "needs a JSON object"),
        ("no-such-file.json", "no-such-file.json: cannot be read"),
    ],
)
def test_classes_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(InputError, match=f"--control_classes.*{message}"):
        parse_classes(text)


def test_classes_come_from_text_or_a_file(tmp_path):
    (tmp_path / "classes.json").write_text('{"sky": "#0000FF"}')
    assert parse_classes('{"sky": "#0000FF"}') == parse_classes(str(tmp_path / "classes.json")) == {"sky": "#0000ff"}
    assert KEY == "control_classes"
