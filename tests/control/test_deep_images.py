"""Control images of more than 8 bits: one scale for each kind, in training and on the pipeline, or a refusal."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.control import make_encoder, open_control
from PIL import Image

from ether_diffusion import ControlEncoder
from ether_diffusion.control.images import control_tensor
from ether_diffusion.errors import InputError
from ether_diffusion.images import check_image, read_image, to_rgb


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF file of 12 bits, which Pillow reads and does not write: two values in three bytes."""
    pairs = values.astype(int).reshape(-1, 2)
    content = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    content += b"\0" * (len(content) % 2)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(content))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" + struct.pack("<I", 8 + len(content))
    return start + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def saved(kind: str, dtype, **options):
    def save(values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values.astype(dtype)).save(buffer, kind, **options)
        return buffer.getvalue()

    return save


KINDS = {
    "floats in TIFF": (saved("TIFF", np.float32), 1.0),
    "floats in PFM": (saved("PPM", np.float32), 1.0),
    "12 bits in TIFF": (twelve_bits, 4095.0),
    "16 bits in PNG": (saved("PNG", np.uint16), 65535.0),
    "16 bits in TIFF": (saved("TIFF", np.uint16), 65535.0),
    "16 bits in packed TIFF": (saved("TIFF", np.uint16, compression="tiff_lzw"), 65535.0),
    "16 bits in PGM": (saved("PPM", np.uint16), 65535.0),
    "32 bits in TIFF": (saved("TIFF", np.int32), 65535.0),
}


def write(path: Path, kind: str, shares) -> np.ndarray:
    """A file with these parts of white, and what 8 bits hold of it."""
    save, white = KINDS[kind]
    shares = np.asarray(shares, dtype=np.float64)
    path.write_bytes(save(shares * white if white == 1 else np.round(shares * white)))
    return np.round(shares * 255)


def read_for_training(path: Path, value_range=None) -> np.ndarray:
    return np.asarray(read_image(path, value_range=value_range))[..., 0].astype(int)


def read_by_pipeline(path: Path, value_range=None) -> np.ndarray:
    with Image.open(path) as image:
        height, width = np.asarray(to_rgb(image, value_range)).shape[:2]
        tensor = control_tensor(image, height=height, width=width, value_range=value_range)
    return tensor[0, 0].mul(255).round().int().numpy()


@pytest.mark.parametrize("read", [read_for_training, read_by_pipeline])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_scaled_by_its_kind_and_not_by_what_is_in_it(tmp_path, kind, read):
    dark, light = np.linspace(0, 0.003, 24).reshape(4, 6), np.linspace(0, 1, 24).reshape(4, 6)
    for shares in (dark, light, np.zeros((4, 6)), np.ones((4, 6))):
        wanted = write(tmp_path / "a", kind, shares)
        assert np.abs(read(tmp_path / "a") - wanted).max() <= 1


@pytest.mark.parametrize("value_range", [None, (0, 500), (-100, 70000.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_pipeline_see_the_same(tmp_path, kind, value_range):
    write(tmp_path / "a", kind, np.linspace(0, 1, 24).reshape(4, 6))
    np.testing.assert_array_equal(
        read_for_training(tmp_path / "a", value_range), read_by_pipeline(tmp_path / "a", value_range)
    )


@pytest.mark.parametrize("kind", ["floats in TIFF", "16 bits in PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_training_and_pipeline_turn_an_image_alike(tmp_path, kind, orientation):
    write(tmp_path / "a", kind, np.linspace(0, 1, 24).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(tmp_path / "a") as image:
        image.save(tmp_path / "b", image.format, exif=exif)
    turned = np.rot90(read_for_training(tmp_path / "a"), {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    np.testing.assert_array_equal(read_for_training(tmp_path / "b"), turned)
    np.testing.assert_array_equal(read_by_pipeline(tmp_path / "b"), turned)
    assert check_image(tmp_path / "b") == turned.shape[::-1]


def test_a_range_that_was_stated_holds_and_values_beyond_count_as_its_ends(tmp_path):
    values = np.array([[0, 100, 600, 1100, 4000, 65535]] * 2, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(saved("PNG", np.uint16)(values))
    for read in (read_for_training, read_by_pipeline):
        assert read(tmp_path / "a.png", (100, 1100))[0].tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("value_range", [None, (0, 1)])
@pytest.mark.parametrize("kind", ["floats in TIFF", "floats in PFM"])
def test_values_that_are_not_finite_are_refused_by_training_and_pipeline(tmp_path, kind, value, value_range):
    values = np.full((4, 6), 0.5)
    values[2, 3] = value
    (tmp_path / "a").write_bytes(KINDS[kind][0](values))
    for look in (read_image, check_image):
        with pytest.raises(InputError, match="a: holds values that are not finite"):
            look(tmp_path / "a", value_range=value_range)
    with Image.open(tmp_path / "a") as image, pytest.raises(ValueError, match="control_image holds values that are"):
        control_tensor(image, height=4, width=6, value_range=value_range)


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("floats in TIFF", [0.0, 12.5], "from 0 to 12.5; of mode F, 0 to 1 fit"),
        ("floats in TIFF", [-0.5, 1.0], "from -0.5 to 1; of mode F, 0 to 1 fit"),
        ("32 bits in TIFF", [0, 70_000], "from 0 to 70000; of mode I, 0 to 65535 fit"),
        ("32 bits in TIFF", [-1, 5], "from -1 to 5; of mode I, 0 to 65535 fit"),
    ],
)
def test_values_beyond_the_range_of_their_kind_are_refused_with_the_flag_that_states_another(
    tmp_path, kind, values, told
):
    (tmp_path / "a").write_bytes(KINDS[kind][0](np.array([values] * 2)))
    for look in (read_image, check_image):
        with pytest.raises(InputError, match=f"a: holds values {told}, or state the range .*--conditioning_range"):
            look(tmp_path / "a")
    with Image.open(tmp_path / "a") as image, pytest.raises(ValueError, match=f"control_image holds values {told}"):
        control_tensor(image, height=2, width=2)


def test_an_encoder_keeps_the_range_that_was_stated_and_the_pipeline_goes_by_it(tiny_pipeline_folder, tmp_path):
    pipe = open_control(tiny_pipeline_folder)
    pipe.add_control("depth", make_encoder(pipe, value_range=(0, 4095)))
    pipe.save_ether_weights(tmp_path / "file", "depth")
    pipe.controls["depth"].encoder.save_pretrained(tmp_path / "folder")
    again = open_control(tiny_pipeline_folder)
    again.load_ether_weights(tmp_path / "file", "default")
    assert ControlEncoder.from_pretrained(tmp_path / "folder").arguments == again.controls["default"].encoder.arguments
    assert again.controls["default"].encoder.arguments["value_range"] == [0, 4095]
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 16).reshape(16, 16))
    shallow = to_rgb(deep, (0, 4095))

    def generate(image: Image.Image) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        return again("a dog", control_image=image, generator=generator, **options).images[0]

    np.testing.assert_array_equal(generate(deep), generate(shallow))
    assert np.abs(generate(deep) - generate(to_rgb(deep))).max() > 1 / 255


def test_an_encoder_without_a_stated_range_is_written_as_before(tiny_pipeline_folder):
    pipe = open_control(tiny_pipeline_folder)
    assert set(make_encoder(pipe).arguments) == {
        "out_channels", "conditioning_channels", "block_out_channels", "interpolation",
    }  # fmt: skip


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (0,), (0, float("nan")), (0, float("inf"))])
def test_a_range_that_does_not_rise_is_refused(tiny_pipeline_folder, value_range):
    pipe = open_control(tiny_pipeline_folder)
    with pytest.raises(ValueError, match="two finite numbers fit, the first below the second"):
        make_encoder(pipe, value_range=value_range)
