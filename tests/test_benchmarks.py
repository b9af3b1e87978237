"""The benchmarks, called as users call them, in the smallest run that touches every part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def call(script: str, *flags: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_speed_is_measured_for_every_method_and_drawn(tmp_path):
    table = call("training_step.py", "--output_dir", tmp_path, "--rounds", 2)
    rows = json.loads((tmp_path / "training_step_cpu-small.json").read_text())["rows"]
    assert list(rows) == [
        "frozen limit", "ETHER", "ETHER, 4 blocks", "ETHER+", "LoRA r=1", "LoRA r=4", "OFT, block 32", "BOFT",
        "HRA r=2", "VeRA", "paper's dense ETHER",
    ]  # fmt: skip
    for name, row in rows.items():
        assert name in table and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["memory"] >= rows["frozen limit"]["memory"]
    # Counted, not timed: true on every machine.
    assert rows["ETHER"]["memory"] <= rows["ETHER+"]["memory"] <= rows["LoRA r=4"]["memory"]
    assert rows["ETHER"]["parameters"] == rows["ETHER, 4 blocks"]["parameters"] < rows["LoRA r=1"]["parameters"]

    table = call("inference.py", "--output_dir", tmp_path, "--rounds", 2)
    report = json.loads((tmp_path / "inference_cpu-small.json").read_text())
    assert {"no adapter", "ETHER, unfused", "ETHER, fused", "ETHER, kept", "LoRA r=4, unfused"} <= set(report["step"])
    for calls in report["loading"].values():
        assert list(calls) == ["load", "activate", "fuse", "unfuse", "unload"]
        assert all(call["seconds"] > 0 and call["ratio"] > 0 for call in calls.values())
    assert all(name in table for name in (*report["step"], *report["loading"]))

    drawn = call("plot.py", "--results_dir", tmp_path, "--output_dir", tmp_path / "docs").split()
    assert drawn == [str(tmp_path / "docs" / "speed_cpu-small.png")] and Path(drawn[0]).stat().st_size > 10_000


def test_a_plot_of_nothing_says_what_to_run(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "plot.py"), "--results_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "run the benchmarks first" in done.stderr


def test_the_learning_rate_sweep_compares_with_the_base_model(tmp_path):
    call(
        "learning_rate_sweep.py", "--output_dir", tmp_path, "--learning_rates", 1e-3, "--steps", 1, 2, "--subjects", 1
    )  # fmt: skip
    report = json.loads((tmp_path / "learning_rate_sweep.json").read_text())
    assert [(row["method"], row["steps"]) for row in report["rows"]] == [
        (method, steps) for method in ("ether", "ether_plus") for steps in (1, 2)
    ]
    assert all(row["held_out"] != report["base"]["held_out"] for row in report["rows"])


def test_a_held_out_photograph_is_measured_before_and_after(tmp_path):
    from ether_diffusion.miniature.world import subjects

    (tmp_path / "data" / "toy").mkdir(parents=True)
    for k in range(3):
        subjects()[0].view(k).render().image.save(tmp_path / "data" / "toy" / f"{k}.png")
    flags = ("--max_train_steps", 2, "--num_validation_images", 0)
    call("held_out_photograph.py", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *flags)
    losses = json.loads((tmp_path / "out" / "held_out_photograph.json").read_text())["denoising_loss"]["toy"]
    assert losses["tuned_held_out"] != losses["base_held_out"] and losses["tuned_seen"] != losses["base_seen"]
