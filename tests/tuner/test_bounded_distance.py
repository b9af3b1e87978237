"""The study of bounded distance: what its transforms are, and its shortest run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ether_diffusion.miniature import load_pipeline
from ether_diffusion.tuner.model import ATTENTION

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bounded_distance

    return bounded_distance


@pytest.fixture(scope="module")
def unet():
    return load_pipeline().unet


def moved(study, unet, name: str, strength: float) -> dict:
    (perturbation,) = (each for each in study.STUDIED if each.name == name)
    return study.perturbed(unet, ATTENTION, perturbation, strength, seed=0)[1]


@pytest.mark.parametrize("degrees", [3.0, 90.0])
def test_ether_plus_is_turned_by_the_angle_that_is_asked_for(study, unet, degrees):
    for name in ("ETHER+", "ETHER+ one side"):
        distance = moved(study, unet, name, degrees)["transform_distance"]
        assert distance == pytest.approx(math.sqrt(2) * math.sin(math.radians(degrees)), rel=1e-3)


def test_reflections_and_rotations_are_bounded_and_what_is_added_is_not(study, unet):
    assert moved(study, unet, "ETHER", 4)["transform_distance"] == pytest.approx(4)  # 2√n
    # An orthogonal T keeps the length of W, so that W' is at most 2|W| away.
    assert moved(study, unet, "OFT, blocks of 32", 100.0)["relative_distance"] <= 2
    assert moved(study, unet, "HRA r=2", 100.0)["transform_distance"] <= 2 * math.sqrt(2)
    for name in ("LoRA r=4", "noise"):
        less, more = (moved(study, unet, name, strength) for strength in (1.0, 100.0))
        assert more["relative_distance"] == pytest.approx(100 * less["relative_distance"], rel=1e-2)
        assert more["transform_distance"] is None


def test_a_seed_gives_the_same_transforms_again_and_leaves_the_base(study, unet):
    held = {name: weight.clone() for name, weight in unet.state_dict().items()}
    for perturbation in study.STUDIED:
        once, again = (moved(study, unet, perturbation.name, perturbation.strengths[0]) for _ in range(2))
        assert once == again
    assert all(torch.equal(weight, held[name]) for name, weight in unet.state_dict().items())


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_was_stopped(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bounded_distance.py"), "--output_dir", str(tmp_path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bounded_distance.json").read_text())["rows"]
    assert len(rows) == 1 + 2 * 7
    assert all(row["drift"] is not None and f"{row['method']:18}" in done.stdout for row in rows)
    assert done.stdout.endswith(f"{tmp_path / 'bounded_distance.png'}\n")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == done.stdout
    assert json.loads((tmp_path / "bounded_distance.json").read_text())["rows"] == rows
