"""Images: every kind that people have is read right or refused by name; grids show them under their titles."""

import io
import re
import sys
import time

import numpy as np
import pytest
from helpers.images import gradient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ether_diffusion.errors import InputError
from ether_diffusion.images import check_image, find_images, image_grid, left_out, read_image, some, to_pixels


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


# Pillow's own suffixes that it also writes, and so many that people have.
WRITTEN = ["apng", "avif", "bmp", "dib", "gif", "im", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "pcx", "pgm"]
WRITTEN += ["png", "pnm", "ppm", "qoi", "rgb", "sgi", "tga", "tif", "tiff", "webp", "JPG", "Jpe", "JFIF", "TGA"]


@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_format_that_pillow_reads_is_found_and_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, **({"quality": 95} if suffix.lower() in ("jpg", "jpe", "jpeg", "jfif") else {}))
    assert find_images(tmp_path) == [path] and left_out(tmp_path, [path]) == []
    assert read_image(path).size == check_image(path) == (40, 30)
    error = np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(gradient())).mean()
    assert error < (12 if suffix == "gif" else 5)


def test_an_image_without_a_suffix_is_found_by_what_it_holds(tmp_path):
    gradient().save(tmp_path / "photo", "JPEG")
    (tmp_path / "LICENSE").write_text("of no image")
    assert find_images(tmp_path) == [tmp_path / "photo"]
    assert left_out(tmp_path, [tmp_path / "photo"]) == ["LICENSE"]


OTHERS = ["a.jxl", "a.nef", "a.cr2", "a.dng", "a.raw", "a.svg", "a.pdf", "a.mp4", "a.eps", "a.zip", "a.fits", "noext"]


@pytest.mark.parametrize("name", [*OTHERS, "link.jpg", "gone", "folder", "folder.jpg"])
def test_what_is_no_image_is_left_out_by_name(tmp_path, name):
    gradient().save(tmp_path / "b.png")
    (tmp_path / ".hidden.jxl").write_bytes(b"x")
    words = name
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
        words = f"{name}/ (a folder)"
    elif name in ("link.jpg", "gone"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere.jpg")
        words = f"{name} (a broken link)"
    else:
        # A camera's raw files are TIFF with a thumbnail, which is not the image.
        gradient().save(tmp_path / name, "TIFF") if name.endswith(("nef", "cr2", "dng")) else (
            tmp_path / name
        ).write_bytes(b"x")
    assert find_images(tmp_path) == [tmp_path / "b.png"]
    assert left_out(tmp_path, [tmp_path / "b.png"]) == [words]
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=re.escape(f"files but no image ({words})")):
        find_images(tmp_path)


def test_of_many_names_the_first_are_told_and_the_others_counted():
    assert some([f"{k}.jxl" for k in range(50)], 2) == "0.jxl, 1.jxl and 48 more"
    assert some(["a\x1b[2J\n.jxl"]) == "a\\x1b[2J\\n.jxl"


# HEIC


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.hif", "a.jpg"])
@pytest.mark.parametrize("look", [read_image, check_image])
def test_an_heic_image_without_its_package_says_which_it_is(tmp_path, monkeypatch, name, look):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    (tmp_path / name).write_bytes(HEIC_START)
    (path,) = find_images(tmp_path)
    for file in (path, io.BytesIO(HEIC_START)):
        with pytest.raises(InputError, match=r"a.*: HEIC images need .* pip install \"ether-diffusion\[heif\]\""):
            look(file, name)


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_heic_image_is_read_upright_and_pillow_stays_as_it_is(tmp_path, orientation):
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    heif.from_pillow(gradient()).save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    wanted = np.asarray(gradient() if orientation == 1 else gradient().rotate(-90, expand=True)).astype(int)
    for file in (tmp_path / "a.heic", io.BytesIO((tmp_path / "a.heic").read_bytes())):
        assert np.abs(np.asarray(read_image(file, "a")) - wanted).mean() < 4
        assert check_image(file, "a") == wanted.shape[1::-1]
    assert ".heic" not in Image.registered_extensions()
    (tmp_path / "a.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:-200])
    with pytest.raises(InputError, match="a.heic: the image is truncated or damaged"):
        check_image(tmp_path / "a.heic")


# What is wrong with an image is told for what it is.


def with_text(path, text: str, compressed: bool) -> None:
    info = PngInfo()
    info.add_text("workflow", text, zip=compressed)
    gradient().save(path, pnginfo=info)


@pytest.mark.parametrize("look", [read_image, check_image])
def test_too_many_pixels_and_too_much_text_are_not_called_no_image(tmp_path, monkeypatch, look):
    with_text(tmp_path / "text.png", "x" * 2_000_000, True)
    with pytest.raises(InputError, match="text.png: carries more text than is read .* save it without its metadata"):
        look(tmp_path / "text.png")
    with_text(tmp_path / "plain.png", "x" * 2_000_000, False)
    look(tmp_path / "plain.png")
    gradient().save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match="large.png: is too large .*1200 pixels.*; make it smaller"):
        look(tmp_path / "large.png")


@pytest.mark.parametrize("look", [read_image, check_image])
def test_a_file_that_is_not_there_or_cannot_be_read_is_told_as_that(tmp_path, look):
    with pytest.raises(InputError, match="nowhere.png: there is no such file"):
        look(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        look(tmp_path)


def test_white_is_one_and_black_is_minus_one():
    values = to_pixels(Image.new("RGB", (2, 2), "white")), to_pixels(Image.new("RGB", (2, 2), "black"))
    assert (values[0] == 1).all() and (values[1] == -1).all()
