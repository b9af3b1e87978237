"""Photographs that users send."""

from pathlib import Path

import pytest
from helpers.demo import in_gallery
from PIL import Image

from ether_diffusion.demo.photos import read_photo
from ether_diffusion.errors import InputError


def test_a_photo_with_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png: has 60,000,000 pixels; 50,000,000 at most fit"):
        read_photo(tmp_path / "large.png", 256)
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no.png: is not an image that can be read"):
        read_photo(tmp_path / "no.png", 256)


def test_photos_come_upright_and_small_and_the_bad_one_is_marked(client, tmp_path):
    tall = Image.new("RGB", (3000, 2000))
    tall.save(tmp_path / "turned.jpg", exif=turned())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    sent = [in_gallery(tmp_path / name) for name in ("turned.jpg", "bad.jpg")]
    shown, said = client.predict(sent, api_name="/photos")
    good, bad = shown
    assert Image.open(good["image"]).size == (1365, 2048) and good["caption"] is None
    assert bad["caption"] == "✗ bad.jpg"
    assert "bad.jpg: is not an image that can be read" in said["value"] and "Remove what is marked" in said["value"]
    photos = [*[in_gallery(Path(good["image"]))] * 3, in_gallery(Path(bad["image"]))]
    with pytest.raises(Exception, match=r"Photos: remove what is marked with ✗ \(1 of 4\) first"):
        client.predict(photos, "dog", "dog", "", "ether", 2, None, api_name="/train")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return exif


def test_a_photo_of_a_phone_is_read(client, photographs, tmp_path):
    heif = pytest.importorskip("pillow_heif")
    with Image.open(sorted(photographs.iterdir())[0]) as image:
        heif.from_pillow(image.convert("RGB")).save(tmp_path / "phone.heic")
    ((shown,), _) = client.predict([in_gallery(tmp_path / "phone.heic")], api_name="/photos")
    assert Image.open(shown["image"]).size == (64, 64) and shown["caption"] is None
