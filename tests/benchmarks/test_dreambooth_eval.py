"""The DreamBooth evaluation, called as users call it, in the smallest run that touches every part."""

import json

import pytest
from helpers.benchmarks import finish, start

pytestmark = pytest.mark.slow


def begin(folder, *flags):
    return start("dreambooth_eval.py", "--output_dir", folder, "--quick", *flags)


def figures(folder):
    rows = json.loads((folder / "dreambooth_eval.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "commit"} for row in rows]


def test_two_shards_measure_what_one_process_does_and_nothing_is_learned_twice(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    printed = finish(begin(alone))
    rows = figures(alone)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["clip_i"] < 1 and 0 < row["drift"] < 1  # a few steps change little, and not nothing
        assert row["dino"] is None and row["missing"]["dino"] == "--dino_model none"
        assert row["lpips"] is not None or "LPIPS" in row["missing"]["lpips"]
        assert (alone / "pictures" / row["subject"] / "sheet.png").is_file() and row["subject"] in printed

    made = {path: path.stat().st_mtime_ns for path in alone.rglob("*.safetensors")}
    assert made
    finish(begin(alone))
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*.safetensors")} == made
    assert figures(alone) == rows

    process = begin(alone, "--learning_rate", 0.5)
    assert "was begun with another learning_rate" in process.communicate()[1] and process.returncode
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*.safetensors")} == made

    for process in [begin(shared, "--shard", f"{k}/2") for k in range(2)]:
        finish(process)
    finish(begin(shared))  # the table of both
    for row, other in zip(rows, figures(shared), strict=True):
        assert {k: v for k, v in other.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in row.items() if isinstance(v, float)}, abs=1e-4
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shard", "2/2"), "got '2/2', needs INDEX/COUNT"),
        (("--data_dir", "missing"), "--data_dir missing: needs a folder with one folder of photographs per subject"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(tmp_path, flags, message):
    process = begin(tmp_path / "out", *flags)
    _, stderr = process.communicate()
    assert process.returncode and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
