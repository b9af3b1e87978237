"""The studies of learning rates, parameters and energy: what they compute, and a quick run of each."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from energy import outcomes, rank_correlation, with_interval
from helpers.benchmarks import FOLDER, call
from helpers.scripts import wait_until
from lr_robustness import RATES, explore, interval, means, usable_rates, window
from parameter_efficiency import climb, difference, score, variants
from trials import Bench, Settings, Trial, Variant, pairs

from ether_diffusion.base_models import MINIATURES
from ether_diffusion.files import checksum
from ether_diffusion.miniature import load_pipeline

LAYERED = ("ETHER+ one side", "OFT, blocks of 4")
GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def rows(clip_i: list[float], clip_t: float = 0.8) -> list[dict]:
    """One trial for each pair, at one learning rate."""
    return [{"clip_i": value, "clip_t": clip_t, "drift": 0.1} for value in clip_i]


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody waits for stays as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestWindow:
    def test_it_is_the_run_of_rates_within_90_percent_around_the_best(self):
        figures = {1e-4: (0.30, 0.8), 1e-3: (0.55, 0.8), 1e-2: (0.60, 0.8), 1e-1: (0.54, 0.8), 1.0: (0.53, 0.8)}
        found = window(figures, 0.8, GRID)
        assert (found.low, found.high) == (1e-3, 1e-1) and found.decades == pytest.approx(2)
        assert not found.open_low and not found.open_high

    def test_a_rate_that_generates_nothing_but_the_subject_is_outside(self):
        figures = {1e-3: (0.5, 0.8), 1e-2: (0.9, 0.3)}
        assert window(figures, 0.8, GRID)[:2] == (1e-3, 1e-3)  # and its CLIP-I is not the measure of the others

    def test_a_gap_ends_it_but_not_the_count_of_usable_rates(self):
        figures = {1e-4: (0.6, 0.8), 1e-3: (0.2, 0.8), 1e-2: (0.61, 0.8)}
        assert window(figures, 0.8, GRID)[:2] == (1e-2, 1e-2)
        assert usable_rates(figures, 0.8) == [1e-4, 1e-2]

    def test_a_rate_that_was_not_tried_does_not_end_it(self):
        assert window({1e-4: (0.1, 0.8), 1e-3: (0.6, 0.8), 1e-1: (0.6, 0.8)}, 0.8, GRID)[:2] == (1e-3, 1e-1)

    def test_it_is_open_at_the_ends_of_the_grid_only(self):
        assert window(dict.fromkeys(GRID, (0.5, 0.8)), 0.8, GRID)[2:] == (True, True)
        assert window(dict.fromkeys(GRID[1:-1], (0.5, 0.8)), 0.8, GRID)[2:] == (False, False)

    def test_no_usable_rate_is_narrower_than_a_single_one(self):
        nothing, one = window({1e-3: (0.5, 0.1)}, 0.8, GRID), window({1e-3: (0.5, 0.8)}, 0.8, GRID)
        assert nothing.low is None and nothing.decades < one.decades == 0

    def test_its_interval_is_a_point_where_all_pairs_agree(self):
        by_rate = {1e-3: rows([0.5] * 3), 1e-2: rows([0.5] * 3), 1e-1: rows([0.1] * 3)}
        assert interval(by_rate, [0.8] * 3, lambda *draw: window(*draw, GRID).decades) == pytest.approx((1, 1))
        assert interval(by_rate, [0.8] * 3, lambda *draw: len(usable_rates(*draw))) == (2, 2)

    def test_its_interval_spans_what_single_pairs_say(self):
        # The first pair holds at 1e-1, the second does not; drawn twice, each decides alone.
        by_rate = {1e-2: rows([0.5, 0.5]), 1e-1: rows([0.5, 0.1])}
        assert interval(by_rate, [0.8] * 2, lambda *draw: window(*draw, GRID).decades) == pytest.approx((0, 1))

    def test_a_training_that_failed_counts_as_nothing(self):
        assert means([{"clip_i": None, "clip_t": None}, {"clip_i": 0.5, "clip_t": 0.8}]) == (0.25, 0.4)


class TestSearch:
    def test_rates_are_tried_up_and_down_until_two_in_a_row_have_failed(self):
        tried = []

        def measure(rate: float) -> tuple[float, float]:
            tried.append(rate)
            return (0.5 if 1e-3 <= rate <= 1e-1 else 0.1), 0.8

        explore(RATES, 1e-2, measure, 0.8)
        assert tried == [1e-2, 3e-2, 1e-1, 3e-1, 1e0, 3e-3, 1e-3, 3e-4, 1e-4]

    def test_a_single_failure_between_good_rates_does_not_end_it(self):
        figures = {1e-4: 0.1, 1e-3: 0.5, 1e-2: 0.1, 1e-1: 0.5, 1.0: 0.5}
        assert set(explore(GRID, 1e-3, lambda rate: (figures[rate], 0.8), 0.8)) == set(GRID)

    def test_the_grid_has_half_decades_from_1e_6_to_1e4(self):
        assert len(RATES) == 21 and RATES[0] == 1e-6 and RATES[-1] == 1e4
        steps = [math.log10(b / a) for a, b in zip(RATES, RATES[1:], strict=False)]
        assert steps == pytest.approx([0.5] * 20, abs=0.03)

    def test_the_climb_ends_at_the_top_and_measures_nothing_twice(self):
        asked = []

        def score(rate: float) -> float:
            asked.append(rate)
            return -abs(math.log10(rate) + 1)  # best at 1e-1

        assert climb(GRID, 1.1e-3, score) == 1e-1
        assert len(asked) == len(set(asked)) and 1e-4 in asked

    def test_where_all_rates_lose_other_prompts_the_climb_goes_to_those_that_lose_less(self):
        figures = {1e-4: (0.4, 0.8), 1e-3: (0.5, 0.75), 1e-2: (0.55, 0.6), 1e-1: (0.6, 0.5), 1.0: (0.1, 0.1)}
        best = climb(GRID, 1e-1, lambda rate: score(rows([figures[rate][0]], figures[rate][1]), 0.8))
        assert best == 1e-3

    def test_differences_are_paired(self):
        mean, error = difference(rows([0.5, 0.9]), rows([0.4, 0.8]))
        assert mean == pytest.approx(0.1) and error == pytest.approx(0, abs=1e-9)


class TestEnergy:
    def test_rank_correlation_knows_order_alone(self):
        a = np.array([1.0, 2.0, 3.0, 4.0])
        assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
        assert rank_correlation(a, -(a**3)) == pytest.approx(-1)
        # Equal values share a rank.
        ties = np.array([1.0, 1.0, 2.0, 3.0])
        assert rank_correlation(a, ties) == pytest.approx(np.corrcoef([0, 1, 2, 3], [0.5, 0.5, 2, 3])[0, 1])
        assert math.isnan(rank_correlation(a, np.ones(4)))

    def test_a_trial_is_measured_by_the_base_model_of_its_pair(self):
        changes = {"energy_moved": 0.1, "energy_change": -0.1, "relative_distance": 0.2}
        trials = [
            {"variant": "base", "subject": "a", "seed": 0, "clip_i": 0.3, "clip_t": 0.8},
            {"variant": "base", "subject": "a", "seed": 1, "clip_i": 0.4, "clip_t": 0.7},
            {"variant": "ETHER", "subject": "a", "seed": 1, "clip_i": 0.6, "clip_t": 0.5, **changes},
            {"variant": "ETHER", "subject": "a", "seed": 0, "clip_i": None, "clip_t": None, "failed": "…"},
        ]
        (row,) = outcomes(trials)
        assert row["won"] == pytest.approx(0.2) and row["lost"] == pytest.approx(0.2)

    def test_rounding_is_no_change_and_what_is_constant_has_no_correlation(self):
        trials = [{"variant": "base", "subject": "a", "seed": seed, "clip_i": 0.3, "clip_t": 0.8} for seed in (0, 1)]
        for k in range(8):
            changes = {"energy_moved": 1e-11 * k, "energy_change": 0.1 * k, "relative_distance": 0.1 * k}
            own = {"variant": "ETHER", "subject": "a", "seed": k % 2, "clip_i": 0.3 + 0.01 * k, "clip_t": 0.8}
            trials.append({**own, **changes})
        rows = outcomes(trials)
        assert with_interval(rows, "energy_moved", "won") is None
        assert with_interval(rows, "relative_distance", "won") == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("flags", [("--learning_rate", "1e-3"), ("--seed=3",)])
def test_what_every_trial_has_of_its_own_cannot_be_given(flags, tmp_path):
    told = call("lr_robustness.py", "--output_dir", tmp_path / "out", *flags, code=1)
    assert f"error: {flags[0]}: every trial has its own; drop it" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "component", "names"),
    [
        ("miniature", "unet", ("to_q", "to_k", "to_v", "to_out.0")),
        ("miniature-dit", "transformer", ("to_q", "to_k", "to_v", "to_out.0", "_proj", "to_add_out")),
    ],
)
def test_variants_of_a_config_are_in_the_attention_of_their_base(base, component, names):
    model = getattr(load_pipeline(base), component)
    attention = [layer for name, layer in model.named_modules() if "attn" in name and name.endswith(names)]
    width = sum(layer.in_features for layer in attention)
    one_side, oft = (each for each in variants()["ether_plus"] + variants()["oft"] if each.name in LAYERED)
    assert one_side.parameters(base) == 2 * width
    assert oft.parameters(base) == width // 4 * 6  # blocks of 4 × 4, skew-symmetric


@pytest.mark.slow
def test_the_studies_take_the_transformer_and_say_so(tmp_path):
    flags = ("--output_dir", tmp_path, "--quick", "--base", "miniature-dit")
    assert "ETHER+" in call("lr_robustness.py", *flags)
    assert "LoRA r=4" in call("parameter_efficiency.py", *flags)
    report = json.loads((tmp_path / "trials.json").read_text())
    assert report["model"] == "miniature-dit" and report["weights_sha256"] == checksum(MINIATURES["miniature-dit"])
    told = call("lr_robustness.py", "--output_dir", tmp_path, "--quick", code=1)
    assert "holds rows of model miniature-dit, not miniature" in told


@pytest.mark.slow
def test_the_studies_share_their_trials_and_are_drawn(tmp_path):
    printed = call("lr_robustness.py", "--output_dir", tmp_path, "--quick")
    held = json.loads((tmp_path / "trials.json").read_text())["rows"]
    assert [(row["variant"], row.get("learning_rate")) for row in held] == [
        ("base", None), ("ETHER+", 1e-3), ("ETHER+", 3e-3)
    ]  # fmt: skip
    base, *tuned = held
    for row in tuned:
        assert row["clip_i"] != base["clip_i"] and row["drift"] > 0 and 0 < row["relative_distance"] < 0.1
        assert row["energy_moved"] > 0
    assert "ETHER+" in printed and (tmp_path / "lr_strips.png").stat().st_size > 5_000

    table = call("parameter_efficiency.py", "--output_dir", tmp_path, "--quick")
    after = json.loads((tmp_path / "trials.json").read_text())["rows"]
    # That of ETHER+ is not run again.
    assert after[:3] == held and [(row["variant"], row["steps"]) for row in after[3:]] == [("LoRA r=4", 2)]
    assert "39,936" in table and "19,968" in table

    longer = call("lr_robustness.py", "--output_dir", tmp_path, "--quick", "--steps_factor", "2")
    assert json.loads((tmp_path / "trials.json").read_text())["rows"][-1]["steps"] == 4 and "ETHER+" in longer
    drawn = call("plot.py", "--results_dir", tmp_path, "--output_dir", tmp_path / "docs").split()
    assert {Path(path).name for path in drawn} == {"lr_robustness.png", "lr_robustness_4.png", "energy.png"}
    assert "trials" in call("energy.py", "--results", tmp_path / "trials.json")
    assert json.loads((tmp_path / "energy.json").read_text()) == {}  # too few to say anything


@pytest.mark.slow
def test_a_study_that_is_killed_leaves_no_process_behind(tmp_path):
    command = [sys.executable, str(FOLDER / "lr_robustness.py"), "--output_dir", str(tmp_path), "--processes", "2"]
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (tmp_path / "trials.json").exists(), 300)  # the base model is measured: trainings begin
        children = [child.pid for child in psutil.Process(study.pid).children()]
        assert len(children) >= 2 and all(map(runs, children))
    finally:
        study.kill()
        study.wait()
    wait_until(lambda: not any(map(runs, children)), 60)


@pytest.mark.slow
def test_a_training_that_fails_is_a_row_and_the_study_goes_on(tmp_path):
    (subject, seed), other = pairs(2, None, tmp_path / "views")
    assert subject != other[0] and (seed, other[1]) == (0, 1)
    bench = Bench(Settings(num_inference_steps=1), tmp_path / "pictures")
    row = bench.run(Trial(Variant.of("lora"), 1e4, subject, seed, 3))
    assert row["failed"] == "the loss is not finite" and row["clip_i"] is None
    config = {"peft_type": "ETHER", "method": "ether_plus", "sides": "input", "target_modules": ["to_q"]}
    row = bench.run(Trial(Variant("one side", config=config), 1e-3, subject, seed, 1))
    assert row["clip_i"] is not None and row["relative_distance"] > 0
    row = bench.run(Trial(Variant.of("full"), 1e-4, subject, seed, 1))
    assert row["relative_distance"] > 0  # measured against the weights on disk
