"""The benchmark of serving, called as users call it, and the simulated line beside it."""

import json
import random

import pytest
from helpers.benchmarks import call
from hypothesis import given
from hypothesis import strategies as st
from serving_parts.load import arrivals_of
from serving_parts.queue_model import Costs, simulate

COSTS = Costs({2: 1.0, 4: 1.5, 8: 2.5}, image=0.5, answer=0.25)
GAPS = st.lists(st.floats(0, 10), min_size=1, max_size=30)


def at(gaps):
    """Times of arrival with these gaps between them."""
    return [sum(gaps[: k + 1]) for k in range(len(gaps))]


def test_a_step_costs_what_was_measured_and_between_two_sizes_a_straight_line():
    assert [COSTS.step(rows) for rows in (1, 2, 3, 4, 6, 8)] == [1.0, 1.0, 1.25, 1.5, 2.0, 2.5]
    with pytest.raises(ValueError, match="10 rows; the cost is known up to 8"):
        COSTS.step(10)


def test_requests_share_steps_and_wait_for_each_others_images():
    # Two from the start: three steps of both, 4.5; then an image each. The third comes during the second step, shares
    # the last one of theirs, 2.0, and has two alone.
    seconds = simulate([0.0, 0.0, 2.0], steps=3, rows=2, max_batch=8, costs=COSTS)
    shared = 1.5 + 1.5 + COSTS.step(6)
    assert seconds == pytest.approx(
        [shared + 0.5 + 0.25, shared + 1.0 + 0.25, shared + 1.0 + 2 * 1.0 + 0.5 + 0.25 - 2]
    )


def test_who_does_not_fit_the_batch_waits_for_a_whole_request():
    first, second = simulate([0.0, 0.0], steps=2, rows=2, max_batch=2, costs=COSTS)
    assert (first, second) == (2.75, 5.25)


@given(GAPS)
def test_one_at_a_time_is_the_textbook_line(gaps):
    times, work = at(gaps), 3 * 1.0 + 0.5
    free, expected = 0.0, []  # Lindley: each begins when it comes, or when the one before it is done
    for time in times:
        free = max(free, time) + work
        expected.append(free + 0.25 - time)
    assert simulate(times, steps=3, rows=2, max_batch=2, costs=COSTS) == pytest.approx(expected)


@given(GAPS)
def test_nobody_is_faster_than_alone_and_a_larger_batch_finishes_no_later(gaps):
    times = at(gaps)
    alone, *_ = simulate([0.0], steps=3, rows=2, max_batch=8, costs=COSTS)
    together = simulate(times, steps=3, rows=2, max_batch=8, costs=COSTS)
    apart = simulate(times, steps=3, rows=2, max_batch=2, costs=COSTS)
    assert min(together) >= alone - 1e-9
    end = lambda seconds: max(time + each for time, each in zip(times, seconds, strict=True))  # noqa: E731
    assert end(together) <= end(apart) + 1e-9


def test_arrivals_are_as_many_and_as_frequent_as_asked_and_follow_from_the_seed():
    times = arrivals_of(40, 2000, 5.0, seed=1)
    assert len(times) == 2000 and times == sorted(times) == arrivals_of(40, 2000, 5.0, seed=1)
    assert times[-1] == pytest.approx(400, rel=0.1) and times != arrivals_of(40, 2000, 5.0, seed=2)
    assert random.Random(1).random() != times[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--base", "miniature-dit"), "has no UNet; miniature fits"),
        (("--further", 0), "--further 0: a positive number fits"),
        (("--seed", -1), "--seed -1: a number from 0"),
        (("--parts", "all"), "invalid choice: 'all'"),
    ],
)
@pytest.mark.slow
def test_flags_that_cannot_be_used_are_told_before_anything_is_measured(flags, told, tmp_path):
    assert told in call("serving.py", "--output_dir", tmp_path / "out", *flags, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_part_is_measured_and_drawn(tmp_path, tiny_pipeline_folder):
    out = tmp_path / "new" / "folder"
    given = ("--base", tiny_pipeline_folder, "--output_dir", out, "--quick", "--host_memory", 1)
    table = call("serving.py", *given)
    parts = ("steps", "images", "residency", "overhead", "load", "soak")
    found = {part: json.loads((out / f"serving_{part}.json").read_text()) for part in parts}
    for part, report in found.items():
        assert f"\n{part}, in " in table and report["settings"]["seed"] == 0 and report["machine"]["threads"] >= 1
    assert {"one ETHER", "8 ETHER, rows", "8 ETHER+, rows", "8 LoRA r=4, adapter_names"} <= set(found["steps"]["rows"])
    assert found["steps"]["direct"]["8 ETHER, rows"]["ratio"] > 0
    assert all(row["images_per_second"] > 0 for row in found["images"]["rows"].values())
    assert list(found["residency"]["steps"]) == ["2", "20"]
    assert found["residency"]["admission"]["ETHER"]["host_bytes"] > 0
    assert [row["requests"] for row in found["overhead"]["rows"]] == [1, 2, 4, 8, 16]
    for row in found["load"]["rows"]:
        assert 0 < row["measured"]["mean"] <= row["measured"]["p95"] and row["simulated"]["mean"] > 0
    drawn = call("plot.py", "serving", "--results_dir", out, "--output_dir", tmp_path / "docs").split()
    assert drawn == [str(tmp_path / "docs" / "serving.png")]


@pytest.mark.slow
def test_under_load_nothing_is_lost_nothing_is_wrong_and_memory_stays_flat(tmp_path, tiny_pipeline_folder):
    flags = ["--base", tiny_pipeline_folder, "--parts", "soak", "--host_memory", 1, "--further", 800]
    call("serving.py", "--output_dir", tmp_path, *flags)
    report = json.loads((tmp_path / "serving_soak.json").read_text())
    assert (report["answered"], report["lost"], report["wrong"], report["left"]) == (1200, 0, 0, 30)
    assert report["faults"] == [] and report["largest_distance"] <= 1 and report["seconds_until_rows_were_free"] < 5
    assert report["settings"]["names"] == 1000 and report["adapter_host_bytes"] <= 2**20
    assert report["adapter_loads"] > 400  # few fit, so that most are read again
    first, *_, last = report["resident_mib"]
    assert last < 1.01 * first
