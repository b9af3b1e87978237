"""Trackers: which are there, and that losses and images arrive."""

import importlib.metadata
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ether_diffusion.errors import InputError
from ether_diffusion.training.trackers import (
    PROJECT,
    TRACKERS,
    check_trackers,
    init_kwargs,
    log_images,
    tracker_names,
)

RED = Image.new("RGB", (8, 6), (200, 10, 10))
BLUE = Image.new("RGBA", (8, 6), (10, 10, 200, 255))


@pytest.fixture
def wandb_mode(tmp_path, monkeypatch):
    """W&B in a mode, with no account; it reads its surroundings once and has to be told to do so again."""
    wandb = pytest.importorskip("wandb")

    def switch(mode: str, **variables: str) -> None:
        for name, value in {"WANDB_MODE": mode, "WANDB_SILENT": "true", **variables}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    switch("offline")
    yield switch
    monkeypatch.undo()
    wandb.teardown()


def hide(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_report_to_stands_for_the_trackers_that_accelerate_gets(wandb_mode):
    assert tracker_names("none") == []
    assert tracker_names("tensorboard") == ["tensorboard"]
    assert tracker_names("all") == list(TRACKERS)
    for report_to in ("none", "all", *TRACKERS):
        check_trackers(report_to)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch, name):
    hide(monkeypatch, name)
    with pytest.raises(InputError, match=rf"^--report_to {name}: .*pip install {name}$"):
        check_trackers(name)


def test_all_is_what_is_installed_and_at_least_one(monkeypatch):
    hide(monkeypatch, "wandb")
    check_trackers("all")
    assert tracker_names("all") == ["tensorboard"]
    hide(monkeypatch, "tensorboard")
    with pytest.raises(InputError, match="^--report_to all: .*pip install tensorboard or wandb$"):
        check_trackers("all")


@pytest.mark.parametrize("variables", [{}, {"WANDB_API_KEY": "short"}], ids=["no key", "no real key"])
def test_wandb_online_needs_a_login_before_the_training(wandb_mode, variables):
    wandb_mode("online", **variables)
    for report_to in ("wandb", "all"):
        words = "API key must have" if variables else "nobody is logged in"
        with pytest.raises(
            InputError, match=f"^--report_to {report_to}: W&B: .*{words}.*`wandb login`, or set WANDB_M"
        ):
            check_trackers(report_to)


def test_a_folder_of_logs_is_not_taken_for_a_package(tmp_path, monkeypatch):
    def not_installed(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "metadata", not_installed)
    with pytest.raises(InputError, match="pip install wandb"):
        check_trackers("wandb")


def log_a_run(folder: Path, report_to: str) -> None:
    accelerator = Accelerator(cpu=True, log_with=tracker_names(report_to) or None, project_dir=str(folder))
    accelerator.init_trackers(PROJECT, config={"steps": 2}, init_kwargs=init_kwargs(folder))
    for step in (1, 2):
        accelerator.log({"train/loss": 0.5 / step}, step=step)
    log_images(accelerator, "samples", [RED, BLUE], step=2)
    accelerator.end_training()


def test_tensorboard_holds_the_loss_and_the_images(tmp_path):
    log_a_run(tmp_path / "logs", "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / PROJECT), size_guidance={"images": 0}).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    (image,) = events.Images("samples")
    assert image.step == 2
    generated = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(generated, np.hstack([np.asarray(RED), np.asarray(BLUE.convert("RGB"))]))


def test_wandb_holds_the_loss_and_the_images(wandb_mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log_a_run(tmp_path / "logs", "wandb")
    sys.modules["wandb"].teardown()  # its own process writes the run's end, and is waited for here
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    (run,) = (tmp_path / "logs" / "wandb").glob("offline-run-*")
    images = [np.asarray(Image.open(path)) for path in sorted(run.glob("files/media/images/samples_2_*.png"))]
    assert {image[0, 0].tobytes() for image in images} == {bytes((200, 10, 10)), bytes((10, 10, 200))}
    (log,) = run.glob("*.wandb")
    assert b"train/loss" in log.read_bytes() and PROJECT.encode() in log.read_bytes()


def test_a_run_without_trackers_logs_images_nowhere(tmp_path):
    log_a_run(tmp_path, "none")
    assert list(tmp_path.iterdir()) == []
