"""`ether-diffusion quickstart`: what it does with what an earlier one left; the training itself is run elsewhere."""

import pytest

from ether_diffusion.commands.main import main
from ether_diffusion.commands.quickstart import draw_pairs, plan_training


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept")


@pytest.mark.parametrize(("control", "result"), [([], "grid.png"), (["--control"], "evaluation/sheet.png")])
def test_a_finished_quickstart_is_not_written_over(tmp_path, capsys, control, result):
    put(tmp_path, "adapter/README.md", result)
    before = sorted(tmp_path.rglob("*"))
    assert main(["quickstart", *control, "--output_dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a finished quickstart" in line and "--overwrite_output_dir" in line
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / result).read_text() == "kept"


def test_a_stopped_training_goes_on_and_a_finished_one_is_not_repeated(tmp_path, capsys):
    adapter, result = tmp_path / "adapter", tmp_path / "grid.png"
    assert plan_training(adapter, result, overwrite=False) == []
    put(adapter, "checkpoint-5/checkpoint.json")
    assert plan_training(adapter, result, overwrite=False) == ["--resume_from_checkpoint", "latest"]
    assert "goes on from its last checkpoint" in capsys.readouterr().out
    assert plan_training(adapter, result, overwrite=True) == ["--overwrite_output_dir"]
    put(adapter, "README.md")
    assert plan_training(adapter, result, overwrite=False) is None
    assert "is trained already" in capsys.readouterr().out


def test_pairs_whose_drawing_was_stopped_are_drawn_again_and_those_that_are_there_stay(tmp_path):
    data = tmp_path / "data"
    put(data, "000000.png", "control/000000.png")
    draw_pairs(data, 2)
    times = {path: path.stat().st_mtime_ns for path in data.rglob("*.png")}
    draw_pairs(data, 2)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.png")} == times and len(times) == 6
    draw_pairs(data, 3)
    assert len((data / "metadata.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_stopped_control_quickstart_can_be_run_again_to_its_end(tmp_path, capsys):
    flags = ["--control", "--output_dir", str(tmp_path), "--pairs", "8", "--held_out", "2"]
    flags += ["--train_batch_size", "2", "--num_validation_images", "0", "--checkpointing_steps", "1"]
    put(tmp_path, "data/000000.png")
    assert main(["quickstart", *flags, "--max_train_steps", "2"]) == 0
    (tmp_path / "adapter" / "README.md").unlink()  # as if it had been stopped at its end
    (tmp_path / "evaluation" / "sheet.png").unlink()
    assert main(["quickstart", *flags, "--max_train_steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "goes on from its last checkpoint" in printed and (tmp_path / "evaluation" / "sheet.png").exists()


def test_a_training_that_is_refused_says_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["quickstart", "--output_dir", str(tmp_path), "--max_train_steps", "0"])
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: --max_train_steps: got 0")
