"""Instance pictures: every kind that people have, read right or refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.training.data import InstanceImages, center_square, find_images, read_image, to_pixels
from ether_diffusion.training.options import InputError


def gradient(width=40, height=30) -> Image.Image:
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_every_format_reads_as_the_same_picture(tmp_path, suffix):
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    gradient().save(tmp_path / f"a.{suffix}", **options)
    read = np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(int)
    assert np.abs(read - np.asarray(gradient())).mean() < 3


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    gradient().convert(mode).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB"
    grey = np.asarray(image.convert("L")).astype(int)
    assert np.abs(grey - np.asarray(gradient().convert("L"))).mean() < (40 if mode == "1" else 12) or mode == "1"


def test_sixteen_bits_keep_their_range(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))[..., 0]
    assert np.abs(read - values / 257).max() <= 1


def test_transparency_is_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    image.save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))
    assert (read[:, 4:] == 255).all() and (read[:, :4] == (0, 0, 255)).all()


def test_orientation_in_the_exif_data_is_applied(tmp_path):
    image = gradient(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.size == (20, 40)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image.rotate(-90, expand=True))).mean() < 4


def test_only_pictures_are_taken_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.jpg", "9.png", "b.webp"):
        gradient().save(tmp_path / name)
    for name in (".hidden.jpg", "captions.txt", "metadata.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.jpg").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["9.png", "10.jpg", "b.webp"]


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="holds 1 files but no picture"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        find_images(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_picture_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cut.{suffix}: "):
        InstanceImages([path], prompt="x", resolution=16)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "note.png").write_text("not a picture")
    with pytest.raises(InputError, match="note.png: is not a picture"):
        read_image(tmp_path / "note.png")


def make(folder: Path, count=3, **options) -> InstanceImages:
    for k in range(count):
        gradient(50 + 10 * k, 30).save(folder / f"{k}.png")
    return InstanceImages(find_images(folder), prompt="a photo of sks dog", resolution=16, **options)


def test_every_epoch_shows_every_picture_once_in_its_own_order(tmp_path):
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


def test_small_and_long_pictures_are_fitted(tmp_path):
    gradient(5, 200).save(tmp_path / "a.png")
    images = InstanceImages(find_images(tmp_path), prompt="x", resolution=16)
    assert images.pixels(images.view(0)).shape == (3, 16, 16)
    assert center_square(gradient(7, 90), 16).size == (16, 16)


def test_white_is_one_and_black_is_minus_one():
    values = to_pixels(Image.new("RGB", (2, 2), "white")), to_pixels(Image.new("RGB", (2, 2), "black"))
    assert (values[0] == 1).all() and (values[1] == -1).all()
