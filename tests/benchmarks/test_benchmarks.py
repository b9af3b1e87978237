"""The benchmarks, called as users call them, in the smallest run that touches every part."""

import json
from pathlib import Path

import pytest
from helpers.benchmarks import call
from result_file import ResultFile

from ether_diffusion.base_models import MINIATURE, MINIATURES
from ether_diffusion.files import checksum
from ether_diffusion.miniature.world import subjects

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workload", ["cpu-small", "dit-small"])
def test_speed_is_measured_for_every_method_and_drawn(workload, tmp_path):
    given = ("--output_dir", tmp_path, "--rounds", 2, "--workloads", workload)
    table = call("training_step.py", *given)
    rows = json.loads((tmp_path / f"training_step_{workload}.json").read_text())["rows"]
    assert list(rows) == [
        "frozen limit", "ETHER", "ETHER, 4 blocks", "ETHER+", "LoRA r=1", "LoRA r=4", "OFT, block 32", "BOFT",
        "HRA r=2", "VeRA", "paper's dense ETHER",
    ]  # fmt: skip
    for name, row in rows.items():
        assert name in table and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["memory"] >= rows["frozen limit"]["memory"]
    # Counted, not timed: true on every machine.
    assert rows["ETHER"]["memory"] <= rows["ETHER+"]["memory"]
    if workload == "cpu-small":  # attention of the transformer is narrow, so that LoRA keeps about as little
        assert rows["ETHER+"]["memory"] <= rows["LoRA r=4"]["memory"]
    assert rows["ETHER"]["parameters"] == rows["ETHER, 4 blocks"]["parameters"] < rows["LoRA r=1"]["parameters"]

    table = call("inference.py", *given)
    report = json.loads((tmp_path / f"inference_{workload}.json").read_text())
    assert {"no adapter", "ETHER, unfused", "ETHER, fused", "LoRA r=4, unfused"} <= set(report["step"])
    for calls in report["loading"].values():
        assert list(calls) == ["load", "activate", "fuse", "unfuse", "unload"]
        assert all(call["seconds"] > 0 and call["ratio"] > 0 for call in calls.values())
    assert all(name in table for name in (*report["step"], *report["loading"]))

    drawn = call("plot.py", "--results_dir", tmp_path, "--output_dir", tmp_path / "docs").split()
    assert drawn == [str(tmp_path / "docs" / f"speed_{workload}.png")] and Path(drawn[0]).stat().st_size > 10_000


def test_the_parts_of_a_step_are_measured(tmp_path):
    table = call("step_profile.py", "--output_dir", tmp_path, "--steps", 4, "--flags", "train_batch_size", 2)
    (run,) = json.loads((tmp_path / "step_profile.json").read_text())["runs"].values()
    assert 0 < run["outside"] < 1 and run["shares"]["forward"] > run["shares"]["samples"] > 0
    assert all(part in table for part in run["shares"])


def test_a_plot_of_nothing_says_what_to_run(tmp_path):
    assert "run the benchmarks first" in call("plot.py", "--results_dir", tmp_path, code=2)


@pytest.mark.parametrize("base", MINIATURES)
def test_the_learning_rate_sweep_goes_on_where_it_was_stopped(base, tmp_path):
    flags = ("--output_dir", tmp_path, "--base", base, "--learning_rates", 1e-3, "--subjects", 1, "--steps")
    call("learning_rate_sweep.py", *flags, 1, "--methods", "ether")
    first = json.loads((tmp_path / "learning_rate_sweep.json").read_text())
    call("learning_rate_sweep.py", *flags, 1, 2, "--methods", "ether", "vera")
    report = json.loads((tmp_path / "learning_rate_sweep.json").read_text())
    assert report["weights_sha256"] == checksum(MINIATURES[base])
    assert report.get("model") == (None if base == MINIATURE else base)  # older files name none
    assert report["rows"][0] == first["rows"][0]  # and not measured again:
    assert [(row["method"], row["steps"]) for row in report["rows"]] == [
        ("ether", 1), ("ether", 2), ("vera", 1), ("vera", 2)
    ]  # fmt: skip
    assert all(row["held_out"] != report["base"]["held_out"] for row in report["rows"])


def test_rows_of_other_settings_are_not_mixed(tmp_path):
    ResultFile(tmp_path / "rows.json", {"seed": 0}).add({"method": "ether", "loss": 0.5})
    assert ResultFile(tmp_path / "rows.json", {"seed": 0}).find(method="ether")["loss"] == 0.5
    with pytest.raises(SystemExit, match="holds rows of seed 0, not 1; take another --output_dir"):
        ResultFile(tmp_path / "rows.json", {"seed": 1})


@pytest.mark.parametrize("model", MINIATURES)
def test_methods_are_compared_on_a_subject_and_drawn(model, tmp_path):
    table = call("compare_methods.py", "--output_dir", tmp_path, "--quick", "--base", model)
    report = json.loads((tmp_path / "compare_methods.json").read_text())
    assert report["weights_sha256"] == checksum(MINIATURES[model])
    base, *tuned = report["rows"]
    assert base["method"] == "base" and base["parameters"] == 0
    assert [row["method"] for row in tuned] == ["ether_plus", "lora"]
    for row in tuned:
        assert all(row[figure] != base[figure] for figure in ("held_out", "clip_i", "clip_t"))
        assert row["parameters"] > 0 and row["seconds"] > 0
    assert "ETHER+" in table and "LoRA" in table and "miniature, 1 subject " in table
    sheet = tmp_path / "pictures" / f"miniature_{base['subject']}.png"
    assert str(sheet) in table and sheet.stat().st_size > 10_000


def test_a_learning_rate_of_no_method_is_refused(tmp_path):
    told = call("compare_methods.py", "--output_dir", tmp_path, "--learning_rate", "dora=1", code=2)
    assert "got 'dora=1', needs METHOD=RATE with one of ether, ether_plus" in told


def test_memory_is_estimated_as_it_is_counted_with_data(tmp_path):
    rows = {}
    for device in ("estimate", "cpu"):
        folder = tmp_path / device
        flags = ("--device", device, "--workloads", "cpu-small", "--methods", "ether")
        call("memory.py", "--output_dir", folder, *flags)
        rows[device] = json.loads((folder / "memory.json").read_text())["rows"]
    for estimated, counted in zip(rows["estimate"], rows["cpu"], strict=True):
        assert estimated == {  # kernels on the CPU keep a little more than their shapes say
            name: pytest.approx(value, rel=0.02) if type(value) is int else value for name, value in counted.items()
        }
    plain, cached, checkpointed, _ = rows["cpu"]
    assert checkpointed["activations"] < plain["activations"]
    assert cached["weights"] < plain["weights"] < plain["peak"] and cached["peak"] < plain["peak"]


def test_a_held_out_photograph_is_measured_before_and_after(tmp_path):
    (tmp_path / "data" / "toy").mkdir(parents=True)
    for k in range(3):
        subjects()[0].view(k).render().image.save(tmp_path / "data" / "toy" / f"{k}.png")
    flags = ("--max_train_steps", 2, "--num_validation_images", 0)
    call("held_out_photograph.py", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *flags)
    losses = json.loads((tmp_path / "out" / "held_out_photograph.json").read_text())["denoising_loss"]["toy"]
    assert losses["tuned_held_out"] != losses["base_held_out"] and losses["tuned_seen"] != losses["base_seen"]


@pytest.mark.parametrize("base", MINIATURES)
def test_control_is_compared_over_methods(base, tmp_path):
    flags = ("--output_dir", tmp_path, "--quick", "--base", base)
    printed = call("control.py", *flags)
    report = json.loads((tmp_path / "control.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["none", "ether_plus"]
    none, plus = (row["parameters"] for row in report["rows"])
    assert 0 < none < plus and "ether_plus" in printed
    assert {"real", "with_control", "without_control"} <= set(report["rows"][0]["scores"])
    assert printed.endswith(call("control.py", *flags))  # nothing is trained again
