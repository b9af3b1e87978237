"""Images: every kind that people have is read right or refused by name; grids show them under their titles."""

import time

import numpy as np
import pytest
from helpers.images import gradient
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images, image_grid, read_image, to_pixels


def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_are_not():
    small, large = Image.effect_noise((16, 16), 90).convert("RGB"), Image.new("RGB", (200, 200))
    grid = image_grid([("two", [small, small]), ("one", [small])])
    assert grid.size == (2 * (128 + 8) + 8, 2 * (128 + 40))
    assert np.array_equal(np.asarray(grid.crop((8, 32, 136, 160)))[::8, ::8], np.asarray(small))
    assert image_grid([("black", [large])]).size == (200 + 16, 200 + 40)


def test_a_title_that_is_too_long_is_cut_short_without_delay():
    started = time.perf_counter()
    grid = image_grid([("a word " * 20_000, [Image.new("RGB", (200, 200))])])
    assert grid.width == 200 + 16 and time.perf_counter() - started < 10
    title = np.asarray(grid.convert("L"))[:32]
    assert (title[:, 8:-8] < 255).any() and (title[:, -8:] == 255).all()
    fitting = image_grid([("short", [Image.new("RGB", (200, 200))])])
    assert not np.array_equal(np.asarray(fitting)[:32], title)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_every_format_reads_as_the_same_image(tmp_path, suffix):
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


def test_only_images_are_taken_in_the_order_of_their_numbers(tmp_path):
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
    with pytest.raises(InputError, match="holds 1 files but no image"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        find_images(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cut.{suffix}: "):
        read_image(path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(InputError, match="note.png: is not an image"):
        read_image(tmp_path / "note.png")


def test_white_is_one_and_black_is_minus_one():
    values = to_pixels(Image.new("RGB", (2, 2), "white")), to_pixels(Image.new("RGB", (2, 2), "black"))
    assert (values[0] == 1).all() and (values[1] == -1).all()
