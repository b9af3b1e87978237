"""`benchmarks/full_size.sh`: what it would run, how it goes on, and that the benchmarks know what they are told."""

import re
import shlex
import subprocess
import sys

import pytest
from helpers.benchmarks import FOLDER
from helpers.scripts import ROOT

SCRIPT = FOLDER / "full_size.sh"


def run(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *map(str, flags)], capture_output=True, text=True)


def planned(*flags: object) -> dict[str, list[str]]:
    """Part -> its command."""
    lines = run("--dry_run", *flags).stdout.splitlines()
    return {
        name: shlex.split(command) for name, command in re.findall(r"^(\w+): (.*)$", "\n".join(lines), re.MULTILINE)
    }


@pytest.fixture
def interpreter(tmp_path):
    """Stands for Python on a machine with a GPU: notes what it is called with; memory.py fails if `fail` is there."""
    path = tmp_path / "python"
    lines = [
        "#!/bin/sh",
        f'echo "$1" >> {tmp_path}/called',
        f'if [ "$1" = benchmarks/memory.py ] && [ -e {tmp_path}/fail ]; then exit 1; fi',
    ]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def called(folder) -> list[str]:
    return [word for word in (folder / "called").read_text().splitlines() if word != "-c"]


def test_parts_come_in_order_of_worth(tmp_path):
    assert list(planned()) == ["speed", "inference", "launches", "memory", "peft_image", "serving", "control"]
    assert {"learning_rates", "fronts", "dreambooth_lora"} <= planned("--data_dir", tmp_path).keys()


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path, interpreter):
    (tmp_path / "fail").touch()
    flags = ("--python", interpreter, "--output_dir", tmp_path / "out")
    first = run(*flags)
    assert first.returncode == 1 and "== memory: not finished" in first.stdout
    assert called(tmp_path)[-1] == "-m"  # the control part is run all the same
    (tmp_path / "fail").unlink()
    (tmp_path / "called").unlink()
    second = run(*flags)
    assert second.returncode == 0 and called(tmp_path) == ["benchmarks/memory.py"]
    assert "== speed: done before" in second.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--minutes", "0"], "--minutes 0: needs a whole number above 0"),
        (["--minutes"], "--minutes needs a value"),
        (["--data_dir", "nowhere"], "--data_dir nowhere: there is no such folder"),
        (["--data", "x"], "--data: there are --output_dir"),
        (["--python", "false"], "PyTorch finds no GPU"),
    ],
)
def test_flags_that_cannot_be_used_are_told_before_anything_runs(flags, told, tmp_path):
    refused = run("--output_dir", tmp_path / "out", *flags)
    assert refused.returncode == 2 and told in refused.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_benchmark_knows_its_flags(tmp_path):
    others = subprocess.run(
        [sys.executable, "train_dreambooth_ether.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout  # what lr_robustness.py passes on
    seen = set()
    for name, (_, *words) in planned("--data_dir", tmp_path).items():
        if words[0] == "-m":
            words = words[2:]
        script, *flags = words
        if script in seen and name != "control":
            continue
        seen.add(script)
        helped = subprocess.run([sys.executable, script, *flags, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert helped.returncode == 0, helped.stderr  # a value that is no choice is told before the help
        known = set(re.findall(r"--\w+", helped.stdout + (others if "lr_robustness" in script else "")))
        assert {flag for flag in flags if flag.startswith("--")} <= known, name
