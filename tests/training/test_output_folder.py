"""The output folder: nothing of anybody's is written over, and one run at a time writes to it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers import control_data
from helpers.scripts import DREAMBOOTH, in_process, refusal, same

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.training import control
from ether_diffusion.training.checkpoint_files import MANIFEST_NAME, find_checkpoints
from ether_diffusion.training.output_folder import LOCK_NAME


def content(folder: Path) -> dict[str, str]:
    """Every file and link in a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def steps(folder: Path) -> list[int]:
    return [step for step, _ in find_checkpoints(folder)]


@pytest.fixture
def no_loading(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the weights were read before the output folder was looked at")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A real checkpoint after step 2, beside what its run left."""
    return Path(__file__).parents[1] / "data" / "before" / "dreambooth-2" / "checkpoint-2"


def changed_manifest(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    (folder / MANIFEST_NAME).write_text(json.dumps({**manifest, **values}))


FOREIGN = {
    "another trainer's": "has no checkpoint.json",
    "empty": "has no checkpoint.json",
    "manifest gone": "has no checkpoint.json",
    "manifest cut short": "has no checkpoint.json that can be read",
    "manifest of another kind": "has a checkpoint.json of another kind",
    "newer format": "has format version 2, and this release writes 1",
    "another step's": "is the checkpoint of step 7",
    "a file": "is no folder of its own",
    "a link": "is no folder of its own",
}


def put(kind: str, path: Path, checkpoint: Path) -> None:
    """Something of this kind under the name of a checkpoint."""
    path.parent.mkdir(exist_ok=True)
    if kind in ("a file", "a link"):
        return path.write_text("notes") if kind == "a file" else path.symlink_to(checkpoint)
    if kind in ("another trainer's", "empty"):
        path.mkdir()
        return kind == "empty" or (path / "optimizer.bin").write_bytes(b"weeks of work")
    shutil.copytree(checkpoint, path)
    if kind == "manifest gone":
        (path / MANIFEST_NAME).unlink()
    elif kind == "manifest cut short":
        (path / MANIFEST_NAME).write_bytes((path / MANIFEST_NAME).read_bytes()[:40])
    elif kind == "manifest of another kind":
        (path / MANIFEST_NAME).write_text('{"epoch": 3}')
    else:
        changed_manifest(path, **({"format_version": 2} if kind == "newer format" else {"step": 7}))


@pytest.mark.parametrize("flags", ["", "--resume_from_checkpoint latest", "--overwrite_output_dir"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_of_ours_is_left_alone_with_one_error(
    train, tmp_path, capsys, no_loading, checkpoint, kind, flags
):
    put(kind, tmp_path / "out" / "checkpoint-2", checkpoint)
    before = content(tmp_path)
    error = refusal(capsys, train, "--checkpoints_total_limit", 1, "--checkpointing_steps", 1, *flags.split())
    assert f"holds checkpoint-2, which {FOREIGN[kind]}" in error and "left alone" in error
    assert content(tmp_path) == before


METHODS = ["ether_plus", "lora", "oft", "full"]


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS[:2])
def test_a_second_run_does_not_write_over_the_first(train, tmp_path, capsys, monkeypatch, first, second):
    train("--method", first, "--max_train_steps", 1)
    before = content(tmp_path / "out")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    for more in ([], ["--resume_from_checkpoint", "latest"]):  # nothing to go on from, so it would begin anew
        error = refusal(capsys, train, "--method", second, *more)
        assert "README.md" in error and "--overwrite_output_dir" in error
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["README.md", "grid.png", "unet/config.json", "vae/notes.txt", "model_index.json"])
def test_what_anybody_left_under_the_name_of_a_result_is_not_written_over(train, tmp_path, capsys, no_loading, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    error = refusal(capsys, train, "--method", "full")
    assert f"holds {name.partition('/')[0]}, which this run would write over" in error
    assert path.read_text() == "mine"


@pytest.mark.parametrize("kind", ["light", "controlnet"])
def test_a_second_control_run_does_not_write_over_the_first(tmp_path, capsys, tiny_pipeline_folder, kind):
    usual = {
        "--pretrained_model_name_or_path": tiny_pipeline_folder,
        "--train_data_dir": control_data.write(tmp_path / "pairs"),
        "--max_train_steps": 1,
        "--num_validation_images": 0,
    }
    train = in_process(control.main, usual, tmp_path)
    train("--control_type", kind)
    before = content(tmp_path / "out")
    assert "--overwrite_output_dir" in refusal(capsys, train, "--control_type", kind)
    assert content(tmp_path / "out") == before


def test_overwriting_replaces_what_the_first_run_left_and_nothing_else(train, tmp_path):
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2]
    _, folder = train(*flags, "--seed", 1)
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-best")
    train("--checkpointing_steps", 3, "--overwrite_output_dir")
    assert steps(folder) == [3] and (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoint-best" / MANIFEST_NAME).is_file()
    assert same(folder, train(output="fresh")[1])


def test_overwriting_gives_up_nothing_where_the_new_run_does_not_come_to_its_training(train, tmp_path, monkeypatch):
    flags = ["--max_train_steps", 1, "--checkpointing_steps", 1]
    _, folder = train(*flags)
    before = content(folder)

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fail)
    with pytest.raises(SystemExit):
        train(*flags, "--overwrite_output_dir", "--num_validation_images", 1)
    assert content(folder) == before


def test_overwriting_from_an_earlier_checkpoint_gives_up_the_later_ones_alone(train, tmp_path):
    _, folder = train("--max_train_steps", 4, "--checkpointing_steps", 1)
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 5, "--resume_from_checkpoint", "checkpoint-2"]
    train(*flags, "--overwrite_output_dir")
    assert steps(folder) == [1, 2]


def test_a_run_goes_on_where_its_results_are(train, tmp_path):
    _, folder = train("--max_train_steps", 2, "--checkpointing_steps", 2)
    result, _ = train("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    assert len(result.losses) == 3


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path):
    """Another process at work in the output folder."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out" / LOCK_NAME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_runs_at_once_do_not_mix_and_a_killed_one_leaves_no_lock(train, tmp_path, capsys, other_run):
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        assert "another run writes to it now" in refusal(capsys, train, *flags)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    train()
    assert (tmp_path / "out" / WEIGHTS_NAME).is_file() and not (tmp_path / "out" / LOCK_NAME).exists()


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_trains(tmp_path, photographs, tiny_pipeline_folder):
    flags = ["--pretrained_model_name_or_path", tiny_pipeline_folder, "--instance_data_dir", photographs]
    flags += ["--instance_prompt", "toy", "--output_dir", tmp_path / "out", "--num_validation_images", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DREAMBOOTH), *map(str, flags)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    told = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], told
    assert sum("error: --output_dir" in each for each in told) == 1


COINCIDING = {
    "instance images": "--output_dir {images}",
    "instance images, spelled otherwise": "--output_dir {images}/../images/",
    "a link to the instance images": "--output_dir {link}",
    "images made during the training": "--output_dir {parent} --instance_data_dir {parent}/validation",
    "class images": "--output_dir {other} --with_prior_preservation --class_prompt toys --class_data_dir {other}",
    "class images made during the training": "--output_dir {other} --with_prior_preservation --class_prompt toys "
    "--class_data_dir {other}/validation",
}


@pytest.mark.parametrize("kind", COINCIDING)
def test_images_that_a_run_makes_never_become_what_runs_train_on(
    train, photographs, tmp_path, capsys, no_loading, kind
):
    images = Path(shutil.copytree(photographs, tmp_path / "images"))
    shutil.copytree(photographs, tmp_path / "validation")
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "other").mkdir()
    places = {"images": images, "parent": tmp_path, "link": tmp_path / "link", "other": tmp_path / "other"}
    words = ["--instance_data_dir", "{images}", *COINCIDING[kind].split()]
    before = content(tmp_path)
    assert "would be taken for those to train on" in refusal(capsys, train, *(w.format(**places) for w in words))
    assert content(tmp_path) == before


@pytest.mark.parametrize("output", ["pairs", "pairs/out", "pairs/deep/er"])
@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_no_control_run_writes_into_its_data(tmp_path, capsys, output, flag):
    control_data.write(tmp_path / "pairs")
    before = content(tmp_path)
    words = [flag, str(tmp_path / "pairs"), "--output_dir", str(tmp_path / output)]
    assert "would be taken for those to train on" in refusal(capsys, control.main, words)
    assert content(tmp_path) == before


def test_the_base_is_not_written_over(train, tmp_path, tiny_pipeline_folder, capsys, no_loading):
    base = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "base"))
    before = content(base)
    flags = ["--pretrained_model_name_or_path", f"{base}/", "--output_dir", base, "--overwrite_output_dir"]
    assert "is the folder of the base model" in refusal(capsys, train, *flags, "--method", "oft")
    assert content(base) == before


@pytest.mark.parametrize("method", ["ether_plus", "lora", "oft", "full"])
def test_other_users_can_read_all_that_a_run_leaves(train, method):
    _, folder = train("--method", method, "--max_train_steps", 1, "--num_validation_images", 1)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*") if path.is_file())


def test_no_older_image_stays_beside_newer_weights(train):
    flags = ["--num_inference_steps", 1, "--checkpointing_steps", 2]
    images = ["--num_validation_images", 1, "--validation_steps", 1]
    train(*flags, *images, "--max_train_steps", 4)
    _, folder = train(
        *flags, "--num_validation_images", 0, "--max_train_steps", 5, "--resume_from_checkpoint", "checkpoint-2",
        "--overwrite_output_dir",
    )  # fmt: skip
    assert not (folder / "grid.png").exists()
    assert [path.name for path in sorted((folder / "validation").iterdir())] == ["step-000001.png", "step-000002.png"]
    assert "grid.png" not in (folder / "README.md").read_text()
