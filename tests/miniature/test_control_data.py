"""Pairs of an image and a control image, as folders that training reads."""

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.metrics import edge_consistency
from ether_diffusion.miniature.control_data import KINDS, draw_pair, read_label_image, write_control_data
from ether_diffusion.miniature.render import label_image
from ether_diffusion.miniature.shapes import LABELS


def test_a_map_of_colours_tells_its_classes():
    for k in range(5):
        pair = draw_pair("colours", k)
        assert np.array_equal(read_label_image(pair.control), pair.labels)
    every = Image.fromarray(np.arange(len(LABELS), dtype=np.uint8)[None])
    assert np.array_equal(read_label_image(label_image(every)), every)
    with pytest.raises(ValueError, match="#010203 is the colour of no class"):
        read_label_image(Image.new("RGB", (4, 4), (1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_control_data_is_a_folder_that_training_reads(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = write_control_data(tmp_path / "data", 3, "t", kind)
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 3 and {"image", "conditioning_image", "text"} <= set(rows.column_names)
    pair = draw_pair("t", 1, kind)
    assert rows[1]["text"] == pair.caption
    assert np.array_equal(rows[1]["image"], pair.image)
    assert np.array_equal(Image.open(folder / rows[1]["conditioning_image"]), pair.control)
    with pytest.raises(FileExistsError, match="name another folder"):
        write_control_data(folder, 3, "t", kind)


def test_outlines_lie_on_the_borders_of_their_circles():
    pairs = [draw_pair("t", k, "circles") for k in range(20)]
    assert min(edge_consistency(pair.image, pair.control) for pair in pairs) > 0.9
    assert all(pair.caption.count("circle") in (1, 2, 3) for pair in pairs)
