"""Scores of segmentation: known answers, and a plain reference."""

import numpy as np
import pytest
import torch
from helpers.evaluators import save_upernet
from helpers.scenes import images
from hypothesis import given, settings
from hypothesis import strategies as st

from ether_diffusion.metrics import UperNetSegmenter, class_iou, confusion, mean_iou, pixel_accuracy


def maps(*shape: int, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def test_equal_maps_have_every_score_at_one_and_disjoint_maps_at_zero():
    truth = maps(2, 8, 8)
    assert mean_iou(confusion(truth, truth, 5)) == pixel_accuracy(confusion(truth, truth, 5)) == 1
    wrong = (truth + 1) % 5
    assert mean_iou(confusion(wrong, truth, 5)) == pixel_accuracy(confusion(wrong, truth, 5)) == 0


def test_a_half_right_map_has_the_scores_that_are_counted_by_hand():
    counts = confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), 2)
    assert counts.tolist() == [[2, 1], [0, 1]] and counts.dtype == torch.int64
    assert class_iou(counts).tolist() == pytest.approx([2 / 3, 1 / 2])
    assert mean_iou(counts) == pytest.approx(7 / 12) and pixel_accuracy(counts) == 3 / 4


def test_classes_that_nothing_has_are_left_out_and_those_only_predicted_count_as_zero():
    truth = torch.zeros(4, dtype=torch.uint8)
    assert mean_iou(confusion(truth, truth, 150)) == 1
    assert mean_iou(confusion(torch.tensor([0, 0, 0, 7]), truth, 150)) == pytest.approx(3 / 4 / 2)


@pytest.mark.parametrize("ignored", [255, -1, 3])
def test_ignored_pixels_count_nowhere(ignored):
    truth, predicted = torch.tensor([0, 1, ignored, ignored]), torch.tensor([0, 1, 0, 2])
    assert torch.equal(confusion(predicted, truth, 4, ignored), confusion(predicted[:2], truth[:2], 4))


@settings(max_examples=60, deadline=None)
@given(classes=st.integers(1, 6), seed=st.integers(0, 999), ignored=st.sampled_from([None, 0, 255]))
def test_scores_are_those_of_a_plain_reference_and_counts_add_up(classes, seed, ignored):
    predicted, truth = maps(3, 4, 5, classes=classes, seed=seed), maps(3, 4, 5, classes=classes, seed=seed + 1000)
    if ignored == 255:
        truth[0, 0] = 255
    counts = confusion(predicted, truth, classes, ignored)
    assert torch.equal(counts, sum(confusion(p, t, classes, ignored) for p, t in zip(predicted, truth, strict=True)))
    p, t = predicted.numpy(), truth.numpy()
    counted = np.ones_like(t, bool) if ignored is None else t != ignored
    if not counted.any():
        return
    ious = []
    for c in range(classes):
        named, is_c = (p == c) & counted, (t == c) & counted
        if (named | is_c).any():
            ious.append((named & is_c).sum() / (named | is_c).sum())
    assert mean_iou(counts) == pytest.approx(np.mean(ious))
    assert pixel_accuracy(counts) == pytest.approx((p == t)[counted].mean())


def test_what_cannot_be_counted_is_an_error_that_says_what_fits():
    truth = maps(4)
    for predicted, wrong, message in (
        (maps(5), truth, r"predicted \(5,\), truth \(4,\)"),
        (maps(4).float(), truth, "predicted is torch.float32"),
        (truth + 5, truth, "predicted has the index [5-9], needs 0 to 4"),
        (truth, torch.full((4,), 255), "truth has the index 255, needs 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(predicted, wrong, 5)
    for score in (mean_iou, pixel_accuracy):
        with pytest.raises(ValueError, match="no pixels were counted"):
            score(torch.zeros(5, 5, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"\(5,\), need \(classes, classes\)"):
            score(torch.zeros(5))


def test_a_upernet_from_a_folder_names_every_pixel_at_the_size_of_the_images(tmp_path):
    segment = UperNetSegmenter(str(save_upernet(tmp_path)))
    shown = [image.resize((48, 32)) for image in images(3)]
    named = segment(shown)
    assert segment.classes == 7
    assert named.shape == (3, 32, 48) and named.dtype == torch.int64 and 0 <= named.min() <= named.max() < 7
    assert torch.equal(named[1:2], segment(shown[1:2])), "an image's map depends on its batch"
