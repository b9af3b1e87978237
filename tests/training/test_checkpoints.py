"""Training checkpoints, on an objective of one vector: a stopped loop that goes on ends as one never stopped."""

import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from helpers.scripts import reset_accelerate

from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoint_files import (
    STATE_NAME,
    VECTORS_NAME,
    TrainingCheckpoint,
    find_checkpoints,
)
from ether_diffusion.training.checkpoints import Checkpoints
from ether_diffusion.training.loop import Trainer, TrainingResult
from ether_diffusion.training.options import OptimizationOptions, StateOptions
from ether_diffusion.training.state import RunState, random_state, set_random_state
from ether_diffusion.training.stop_signals import Interrupted, StopSignals


class Noisy(torch.nn.Module):
    """Pulls a vector towards random goals; all three global generators take part. Sample `at` calls `event`."""

    def __init__(self, at: int | None = None, event=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.at, self.event = at, event

    def forward(self, samples):
        if self.at in samples:
            self.event(self)
        goal = torch.randn(len(samples), 3) + random.random() + float(np.random.rand())
        return (self.weight - goal).square().mean(dim=1)


@dataclass(frozen=True)
class Outcome:
    weight: torch.Tensor
    result: TrainingResult


def run(
    folder: Path,
    objective: Noisy | None = None,
    *,
    every=4,
    limit=None,
    resume=None,
    seed=0,
    after_step=None,
    **options,
):
    """Train for 10 steps with checkpoints in a folder. The global generators start from a seed."""
    reset_accelerate()
    options = OptimizationOptions(**{"max_train_steps": 10, "train_batch_size": 2, "learning_rate": 0.1, **options})
    state = StateOptions(checkpointing_steps=every, checkpoints_total_limit=limit, resume_from_checkpoint=resume)
    folder.mkdir(exist_ok=True)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    objective = objective or Noisy()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.gradient_accumulation_steps)
    given = {"max_train_steps": options.max_train_steps, "lr_scheduler": options.lr_scheduler, "method": "ether"}
    checkpoints = Checkpoints(folder, state, given)
    trainer = Trainer(
        accelerator,
        objective,
        [{"params": [objective.weight], "lr": options.learning_rate}],
        options,
        checkpoints=checkpoints,
        validate=after_step,
        validate_after=lambda step: after_step is not None,
    )
    return Outcome(objective.weight.detach(), trainer.train())


def fail(_: Noisy) -> None:
    raise RuntimeError("killed")


def steps(folder: Path) -> list[int]:
    return [step for step, _ in find_checkpoints(folder)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
        {"lr_scheduler": "polynomial"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_losses(tmp_path, options):
    whole = run(tmp_path / "whole", **options)
    passes = options.get("gradient_accumulation_steps", 1)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "stopped", Noisy(at=6 * 2 * passes, event=fail), **options)
    resumed = run(tmp_path / "stopped", resume="latest", seed=99, **options)
    assert torch.equal(resumed.weight, whole.weight)
    assert resumed.result.losses == whole.result.losses
    assert steps(tmp_path / "stopped") == [4, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    whole = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 6 of 10, saved as .*checkpoint-6; "
                       ".*--resume_from_checkpoint latest") as stop:  # fmt: skip
        run(tmp_path / "stopped", Noisy(at=10, event=lambda _: signal.raise_signal(number)))
    assert stop.value.exit_code == 128 + number and signal.getsignal(number) is before
    assert steps(tmp_path / "stopped") == [4, 6]
    assert torch.equal(run(tmp_path / "stopped", resume="latest").weight, whole.weight)


@pytest.mark.parametrize(("sent", "saved"), [(6, 7), (10, 10)])
def test_a_signal_between_two_steps_is_not_lost(tmp_path, sent, saved):
    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"after step {saved} of 10"):
        run(tmp_path / "stopped", after_step=lambda step: step == sent and signal.raise_signal(signal.SIGTERM))
    assert steps(tmp_path / "stopped")[-1] == saved
    assert torch.equal(run(tmp_path / "stopped", resume="latest").weight, whole.weight)


def test_a_second_signal_does_what_it_did_before():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, found)


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_checkpoint(tmp_path):
    def break_it(objective):
        objective.weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="at step 6 of 10; .*the last good checkpoint is .*checkpoint-4$"):
        run(tmp_path / "late", Noisy(at=10, event=break_it))
    with pytest.raises(FloatingPointError, match="at step 2 of 10; .*no checkpoint has been saved"):
        run(tmp_path / "early", Noisy(at=2, event=break_it))


def test_vectors_that_are_not_finite_are_never_saved(tmp_path):
    def break_it(objective):
        objective.weight.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(FloatingPointError, match="weight is not finite after step 8; the last good .*checkpoint-4$"):
        run(tmp_path, Noisy(at=15, event=break_it))
    assert steps(tmp_path) == [4]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "two", every=1, limit=2)
    run(tmp_path / "all", every=3)
    assert steps(tmp_path / "two") == [9, 10] and steps(tmp_path / "all") == [3, 6, 9]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"checkpoint-9", "checkpoint-10"}


def damage(folder: Path, kind: str) -> None:
    if kind == "cut short":
        path = folder / VECTORS_NAME
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "one bit":
        content = bytearray((folder / STATE_NAME).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / STATE_NAME).write_bytes(content)
    else:
        (folder / VECTORS_NAME).unlink()


@pytest.mark.parametrize("kind", ["cut short", "one bit", "a file gone"])
def test_a_torn_checkpoint_is_never_picked_up(tmp_path, kind, caplog):
    whole = run(tmp_path)
    damage(tmp_path / "checkpoint-8", kind)
    with pytest.raises(InputError, match="checkpoint-8: .*(damaged|no complete training checkpoint)"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-8"))
    assert torch.equal(run(tmp_path, resume="latest", limit=1).weight, whole.weight)
    assert "left out" in caplog.text and "checkpoint-8" in caplog.text
    assert steps(tmp_path) == [8]
    assert torch.equal(run(tmp_path, resume="checkpoint-8").weight, whole.weight)


def test_what_a_killed_save_left_is_neither_read_nor_kept(tmp_path):
    run(tmp_path, every=3)
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / ".checkpoint-10.abc.tmp")
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert steps(tmp_path) == [3, 6]
    run(tmp_path, every=3, resume="latest")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}


def test_what_comes_under_the_name_of_a_checkpoint_meanwhile_is_neither_replaced_nor_counted(tmp_path):
    def intrude(_):
        for name in ("checkpoint-3", "checkpoint-8"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "optimizer.bin").write_bytes(b"weeks of work")

    with pytest.raises(OSError, match="checkpoint-8: could not be saved .*has no checkpoint.json.*checkpoint-6$"):
        run(tmp_path, Noisy(at=8, event=intrude), every=2, limit=1)
    assert steps(tmp_path) == [3, 6, 8]
    assert (tmp_path / "checkpoint-3" / "optimizer.bin").read_bytes() == b"weeks of work"


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_names_the_last(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="checkpoint-8: could not be saved .*No space left.*good checkpoint is .*-4$"):
        run(tmp_path, Noisy(at=14, event=lambda _: monkeypatch.setattr(os, "fsync", full)))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4"}


def test_a_checkpoint_in_a_finished_run_leads_to_its_end(tmp_path):
    whole = run(tmp_path, every=5)
    again = run(tmp_path, every=5, resume="latest")
    assert steps(tmp_path) == [5, 10] and torch.equal(again.weight, whole.weight)
    assert again.result.losses == whole.result.losses


def test_latest_without_checkpoints_starts_at_the_beginning(tmp_path):
    assert torch.equal(run(tmp_path / "a", resume="latest").weight, run(tmp_path / "b").weight)


def test_more_steps_are_taken_only_where_the_learning_rate_does_not_depend_on_them(tmp_path):
    longer = run(tmp_path / "longer", max_train_steps=15)
    run(tmp_path / "grown")
    assert torch.equal(run(tmp_path / "grown", max_train_steps=15, resume="latest").weight, longer.weight)
    with pytest.raises(InputError, match="--max_train_steps: was 15 in .* and is 14 now; it may only grow"):
        run(tmp_path / "grown", max_train_steps=14, resume="latest")
    run(tmp_path / "linear", lr_scheduler="linear")
    with pytest.raises(
        InputError, match="--max_train_steps: was 10 .* is 11 now; .*only with --lr_scheduler constant"
    ):
        run(tmp_path / "linear", lr_scheduler="linear", max_train_steps=11, resume="latest")


def test_a_folder_with_later_checkpoints_is_not_mixed_with_a_new_run(tmp_path):
    run(tmp_path)
    for resume in (None, str(tmp_path / "checkpoint-4")):
        with pytest.raises(InputError, match="holds checkpoint-8 of an earlier run; go on with"):
            run(tmp_path, resume=resume)


def test_a_checkpoint_of_other_vectors_is_refused(tmp_path):
    run(tmp_path)
    other = Noisy()
    other.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match=r"weight has shape \(3,\) in it and \(1,\) here"):
        run(tmp_path, other, resume="latest")


def test_the_loss_scaler_goes_on_with_its_scale():
    def state(scale: float) -> RunState:
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.AdamW([weight])
        schedule = get_scheduler("constant", optimizer)
        return RunState({"weight": weight}, optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=scale))

    first, second = state(64.0), state(1.0)
    second.load(TrainingCheckpoint(Path("checkpoint-0"), 0, {}, {"weight": torch.ones(2)}, first.state_dict()))
    assert second.scaler.get_scale() == 64.0 and torch.equal(second.parameters["weight"], torch.ones(2))


def test_every_random_generator_comes_back():
    def draw():
        return random.random(), np.random.randn(), torch.randn(()).item(), random.gauss(0, 1)

    draw()
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first
