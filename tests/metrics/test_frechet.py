"""The Fréchet distance against its formula."""

import numpy as np
import pytest
import torch
from helpers.scenes import images

from ether_diffusion.metrics import frechet_distance


def test_the_distance_is_that_of_its_formula():
    pytest.importorskip("torchmetrics")
    linalg = pytest.importorskip("scipy.linalg")

    class Corners(torch.nn.Module):
        num_features = 3

        def forward(self, pixels):
            return pixels[:, :, 0, 0].float() / 255

    ours, theirs = images(40), images(50, seed="others")
    (mean, cov), (mean_2, cov_2) = (
        (values.mean(0), np.cov(values.T))
        for values in (np.stack([np.asarray(i)[0, 0] for i in s]) / 255.0 for s in (ours, theirs))
    )
    wanted = ((mean - mean_2) ** 2).sum() + np.trace(cov + cov_2 - 2 * linalg.sqrtm(cov @ cov_2).real)
    assert frechet_distance(ours, theirs, features=Corners()) == pytest.approx(wanted, rel=1e-4)


def test_a_distance_that_cannot_be_had_says_what_is_needed():
    with pytest.raises(ValueError, match="got 'clip', needs 'inception' or a module"):
        frechet_distance(images(2), images(2), features="clip")
    with pytest.raises(ValueError, match="got 1 images and 2 references, needs two of each"):
        frechet_distance(images(1), images(2))
