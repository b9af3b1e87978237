"""The miniature's segmenter: small, trained alike every time, and kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.evaluators import QUICK
from helpers.scenes import images
from PIL import Image

from ether_diffusion.miniature import segmenter
from ether_diffusion.miniature.segmenter import MiniatureSegmenter, SegmentationNet


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, MiniatureSegmenter]:
    folder = tmp_path_factory.mktemp("segment")
    return folder, MiniatureSegmenter.load_or_train(folder, QUICK)


def test_a_segmenter_is_trained_once_for_its_settings(quick):
    folder, segment = quick
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns
    again = MiniatureSegmenter.load_or_train(folder, QUICK)
    assert again.record == segment.record and file.stat().st_mtime_ns == before
    shown = images(3)
    assert torch.equal(segment(shown), again(shown)) and segment(shown).shape == (3, 64, 64)
    assert replace(QUICK, seed=1).fingerprint() != QUICK.fingerprint()
    with pytest.raises(ValueError, match=r"got images of \(32, 32\), needs 64"):
        segment([Image.new("RGB", (32, 32))])


def test_a_segmenter_is_trained_alike_every_time_and_disturbs_no_random_state(quick):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    again = segmenter.train_segmenter(QUICK)
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in quick[1].net.state_dict().items():
        assert torch.equal(tensor, again.net.state_dict()[name]), name


def test_the_net_is_small_and_its_cells_are_its_pixels():
    torch.manual_seed(0)
    net = SegmentationNet().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) < 1e6
    pixels = torch.rand(1, 3, 64, 64)
    whole, cells = net(pixels), net.head(net.cells(pixels)).unflatten(-1, (-1, 4))  # (1, 32, 32, k, 4)
    assert torch.equal(whole[0, :, 11, 40], cells[0, 5, 20, :, 2])


@pytest.mark.slow
def test_it_knows_its_world(tmp_path):
    segment = MiniatureSegmenter.load_or_train(tmp_path)
    assert segment.record["held_out_renders"]["pixel_accuracy"] > 0.97
    assert segment.record["held_out_softened"]["pixel_accuracy"] > 0.96
