"""The fronts: what is counted as learned and lost, who chooses a setting, and the command."""

import json

import numpy as np
import pytest
from fronts import BUDGETS, Points, choose, front, interval, points_of, summary
from helpers.benchmarks import call

BASE_ROWS = [
    {"variant": "base", "subject": "toy", "seed": seed, "clip_i": 0.3, "clip_t": 0.8, "drift": 0.0} for seed in (0, 1)
]


def row(variant: str, rate: float, seed: int, clip_i: float | None, clip_t: float | None, steps: int = 200) -> dict:
    key = {"variant": variant, "learning_rate": rate, "steps": steps, "subject": "toy", "seed": seed}
    return {**key, "clip_i": clip_i, "clip_t": clip_t}


def points(learned: list[list[float]], damage: list[list[float]]) -> Points:
    return Points([(float(k), 200) for k in range(len(learned))], np.array(learned), np.array(damage))


def test_points_are_gains_and_shares_of_the_base_model():
    rows = [*BASE_ROWS, row("A", 1e-2, 0, 0.5, 0.8), row("A", 1e-2, 1, 0.4, 0.6), row("A", 1e-1, 0, 0.9, 0.1)]
    found = points_of(rows)["A"]
    assert found.settings == [(1e-2, 200)]  # the other rate has only one of the pairs
    assert found.learned.tolist() == [pytest.approx([0.2, 0.1])]
    assert found.damage.tolist() == [pytest.approx([0.0, 0.25])]


def test_a_training_that_failed_has_lost_all():
    found = points_of([*BASE_ROWS, *(row("A", 1.0, seed, None, None) for seed in (0, 1))])["A"]
    assert (found.damage == 1).all() and (found.learned < 0).all()


def test_steps_select_settings():
    rows = [*BASE_ROWS, *(row("A", 1e-2, seed, 0.5, 0.8, steps) for seed in (0, 1) for steps in (200, 800))]
    assert points_of(rows)["A"].settings == [(1e-2, 200), (1e-2, 800)]
    assert points_of(rows, steps=800)["A"].settings == [(1e-2, 800)]
    assert points_of(rows, steps=50) == {}


def test_the_best_setting_within_the_budget_is_chosen():
    found = points([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]], [[0.0, 0.0], [0.02, 0.04], [0.2, 0.2]])
    assert [choose(found, [0, 1], budget) for budget in (0.01, 0.03, 0.5)] == [0, 1, 2]
    assert choose(found, [0, 1], -0.1) is None


def test_a_pair_is_scored_at_the_setting_that_the_others_choose():
    """Each pair would choose the setting that is good for itself alone."""
    found = points([[0.5, 0.1], [0.1, 0.5]], np.zeros((2, 2)).tolist())
    learned, _ = front(found)
    assert learned.tolist() == [[0.1, 0.1]] * len(BUDGETS)


def test_where_no_setting_is_within_the_budget_nothing_is_learned_and_nothing_lost():
    learned, damage = front(points([[0.5, 0.5]], [[0.055, 0.055]]))
    assert learned[:, 0].tolist() == [0.0] * 5 + [0.5] * 5
    assert damage[:, 0].tolist() == [0.0] * 5 + [0.055] * 5


def test_one_pair_cannot_be_judged_by_others():
    with pytest.raises(ValueError, match="1 pair: choosing on the other pairs needs two"):
        front(points([[0.5]], [[0.0]]))


def test_differences_are_paired():
    """B is 0.1 below A at every pair, however far the pairs lie apart."""
    spread = np.array([[0.1, 0.3, 0.5, 0.7]])
    none = np.zeros((1, 4))
    first, second = summary(
        {"A": Points([(1.0, 200)], spread, none), "B": Points([(1.0, 200)], spread - 0.1, none)}, "A"
    )
    assert (first["variant"], second["variant"]) == ("A", "B")
    assert first["area"] == pytest.approx(0.4) and first["area_interval"][0] < 0.3 < 0.5 < first["area_interval"][1]
    assert second["difference_interval"] == pytest.approx((-0.1, -0.1))


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(size=400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.mark.slow
def test_the_command_writes_rows_that_plot_draws(tmp_path):
    rows = BASE_ROWS + [
        row(variant, 1e-2, seed, clip_i, 0.79)
        for variant, clip_i in (("LoRA r=4", 0.5), ("ETHER+", 0.4))
        for seed in (0, 1)
    ]
    trials = {"model": "miniature", "max_train_steps": 200, "rows": rows}
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    printed = call("fronts.py", "--results_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "| ETHER+ | 1 | 0.090 [0.090, 0.090] |" in printed and "-0.090 [-0.090, -0.090]" in printed
    written = json.loads((tmp_path / "out" / "fronts.json").read_text())
    assert [each["variant"] for each in written["rows"]] == ["LoRA r=4", "ETHER+"]
    drawn = call("plot.py", "--results_dir", tmp_path / "out", "--output_dir", tmp_path / "docs")
    assert drawn.strip().endswith("fronts.png")
    refused = call("fronts.py", "--results_dir", tmp_path, "--output_dir", tmp_path, "--reference", "OFT", code=2)
    assert "--reference OFT: there are LoRA r=4, ETHER+" in refused
