"""A run that was stopped, in whatever way, and goes on ends as one that was never stopped."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from helpers.scripts import DREAMBOOTH, reset_accelerate
from safetensors import safe_open
from safetensors.torch import load_file

from ether_diffusion import miniature
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.miniature.world import subjects
from ether_diffusion.training import dreambooth
from ether_diffusion.training.checkpoints import (
    MANIFEST_NAME,
    STATE_NAME,
    VECTORS_NAME,
    Checkpoints,
    Interrupted,
    RunState,
    Snapshot,
    StopSignals,
    find_checkpoints,
    random_state,
    set_random_state,
)
from ether_diffusion.training.loop import TrainingResult, train
from ether_diffusion.training.options import OptimizationOptions, StateOptions

# The loop, on an objective of one vector ------------------------------------------------------------------------


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


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


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
    result = train(
        accelerator,
        objective,
        [{"params": [objective.weight], "lr": options.learning_rate}],
        options,
        checkpoints=checkpoints,
        validate=after_step,
        validate_after=lambda step: after_step is not None,
    )
    return Outcome(objective.weight.detach(), result)


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
    elif kind == "no manifest":
        (folder / MANIFEST_NAME).unlink()
    elif kind == "manifest cut short":
        (folder / MANIFEST_NAME).write_bytes((folder / MANIFEST_NAME).read_bytes()[:40])
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("kind", ["cut short", "one bit", "no manifest", "manifest cut short", "empty"])
def test_a_torn_checkpoint_is_never_picked_up(tmp_path, kind, caplog):
    whole = run(tmp_path)
    damage(tmp_path / "checkpoint-8", kind)
    with pytest.raises(InputError, match="checkpoint-8: .*(damaged|no whole checkpoint)"):
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
    second.load(Snapshot(Path("checkpoint-0"), 0, {}, {"weight": torch.ones(2)}, first.state_dict()))
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


# The script -----------------------------------------------------------------------------------------------------

QUICK = ["--num_validation_images", "0", "--learning_rate", "0.05", "--random_flip"]


@pytest.fixture(scope="session")
def flags(tiny_pipeline_folder, photographs) -> list[str]:
    """Flags of a run on the tiny pipeline, but for the output folder."""
    return [
        "--pretrained_model_name_or_path", str(tiny_pipeline_folder), "--instance_data_dir", str(photographs),
        "--instance_prompt", "a photo of sks toy", *QUICK,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def script():
    return dreambooth


def start(flags: list[str], folder: Path, *more: str) -> subprocess.Popen:
    """Launch the script; its standard error goes to `<folder>.log`."""
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(DREAMBOOTH), *flags, "--output_dir", str(folder), *more],
            stderr=log,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )


def wait_for(process: subprocess.Popen, happened, seconds: float = 600.0) -> None:
    """Return when `happened()` or when the process has ended."""
    limit = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < limit, "the script does not get on"
        time.sleep(0.005)


def training(folder: Path) -> bool:
    """Whether the script has come to its loop."""
    return b"training:" in folder.with_suffix(".log").read_bytes()


def adapter(folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """What the adapter's file holds, bit for bit; only the order of its metadata differs from save to save."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}


def test_a_run_killed_twice_and_interrupted_once_ends_with_the_same_file(script, flags, tmp_path):
    flags = [*flags, "--max_train_steps", "150", "--checkpointing_steps", "7", "--lr_scheduler", "cosine"]
    reset_accelerate()
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    script.main([*flags, "--output_dir", str(whole)])
    for least in (7, 21):
        process = start(flags, folder, "--resume_from_checkpoint", "latest")
        wait_for(process, lambda least=least: max(steps(folder), default=0) >= least)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = start(flags, folder, "--resume_from_checkpoint", "latest")
    wait_for(process, lambda: training(folder))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    lines = [line for line in folder.with_suffix(".log").read_text().splitlines() if "stopped by SIGINT" in line]
    assert len(lines) == 1 and "--resume_from_checkpoint latest" in lines[0] and "Traceback" not in lines[0]
    assert not (folder / WEIGHTS_NAME).exists()
    reset_accelerate()
    script.main([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    assert adapter(folder) == adapter(whole)


def trained_bytes(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoint-" not in str(path)
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    "more",
    [
        "--use_ema --train_text_encoder --text_encoder_lr 0.01",
        "--optimizer prodigy",
        "--mixed_precision fp16",
        "--mixed_precision bf16 --cache_latents --pre_compute_text_embeddings --offload",
        "--method lora --lr_scheduler cosine_with_restarts --lr_num_cycles 2",
        "--method oft --snr_gamma 5 --noise_offset 0.1",
        "--method vera --gradient_accumulation_steps 2",
        "--method full --use_ema --learning_rate 0.001",
        "--validation_steps 1 --num_validation_images 1 --num_inference_steps 1",
    ],
)
def test_with_every_kind_of_state_a_resumed_run_ends_with_the_same_file(script, flags, tmp_path, more):
    words = [*flags, "--max_train_steps", "5", "--checkpointing_steps", "2", *more.split()]
    folders = tmp_path / "whole", tmp_path / "resumed"
    whole = script.main([*words, "--output_dir", str(folders[0])])
    folders[1].mkdir()
    shutil.copytree(folders[0] / "checkpoint-2", folders[1] / "checkpoint-2")
    reset_accelerate()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    again = script.main([*words, "--output_dir", str(folders[1]), "--resume_from_checkpoint", "latest"])
    first, second = map(trained_bytes, folders)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert again.losses == whole.losses


def test_dropout_goes_on_where_it_was(script, flags, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.5, "target_modules": ["to_q", "to_v"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    test_with_every_kind_of_state_a_resumed_run_ends_with_the_same_file(
        script, flags, tmp_path, f"--adapter_config {tmp_path / 'config.json'} --validation_steps 1"
        " --num_validation_images 1 --num_inference_steps 1"
    )  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_at_random_times_change_no_bit(script, flags, tmp_path):
    flags = [*flags, "--max_train_steps", "60", "--checkpointing_steps", "7", "--checkpoints_total_limit", "2"]
    reset_accelerate()
    whole = tmp_path / "whole"
    result = script.main([*flags, "--output_dir", str(whole)])
    expected = adapter(whole)
    draw, runs, places = random.Random(0), 0, []
    while len(places) < 20:
        runs += 1
        folder = tmp_path / f"run-{runs}"
        while len(places) < 20 and not (folder / WEIGHTS_NAME).exists():
            process = start(flags, folder, "--resume_from_checkpoint", "latest")
            wait_for(process, lambda folder=folder: training(folder))
            time.sleep(draw.uniform(0, result.seconds / 2))
            process.kill()
            if process.wait() != 0:
                assert process.returncode == -signal.SIGKILL, folder.with_suffix(".log").read_text()
                places.append(max(steps(folder), default=0))
        reset_accelerate()
        script.main([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
        assert adapter(folder) == expected
    assert len(set(places)) >= 4, f"the kills did not spread over the run: {places}"


@pytest.mark.slow
def test_two_processes_go_on_together(flags, tmp_path):
    def launch(folder: Path, steps: int) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(DREAMBOOTH), *flags]
        command += ["--output_dir", str(folder), "--max_train_steps", str(steps), "--checkpointing_steps", "3"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--resume_from_checkpoint", "latest"], check=True, env=environment)

    launch(tmp_path / "whole", 8)
    launch(tmp_path / "stopped", 5)
    launch(tmp_path / "stopped", 8)
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")
    state = torch.load(tmp_path / "stopped" / "checkpoint-6" / STATE_NAME, weights_only=True)
    assert len(state["random"]) == 2


def test_a_checkpoint_holds_the_trained_vectors_their_moments_and_nothing_of_the_model(script, flags, tmp_path):
    script.main([*flags, "--output_dir", str(tmp_path), "--max_train_steps", "2", "--checkpointing_steps", "2"])
    (folder,) = tmp_path.glob("checkpoint-*")
    assert {path.name for path in folder.iterdir()} == {MANIFEST_NAME, STATE_NAME, VECTORS_NAME}
    vectors, trained = load_file(folder / VECTORS_NAME), load_file(tmp_path / WEIGHTS_NAME)
    assert sorted(map(tuple, (v.shape for v in vectors.values()))) == sorted(tuple(v.shape) for v in trained.values())
    state = torch.load(folder / STATE_NAME, weights_only=True)
    moments = [tensor for entry in state["optimizer"]["state"].values() for tensor in entry.values()]
    count = sum(vector.numel() for vector in vectors.values())
    assert sum(tensor.numel() for tensor in moments) == 2 * count + len(vectors)  # AdamW counts the steps of each
    assert json.loads((folder / MANIFEST_NAME).read_text())["run"]["method"] == "ether_plus"


@pytest.fixture(scope="session")
def stopped(script, flags, tmp_path_factory) -> Path:
    """The output folder of a run with a checkpoint after its first step."""
    folder = tmp_path_factory.mktemp("stopped")
    reset_accelerate()
    script.main([*flags, "--output_dir", str(folder), "--max_train_steps", "2", "--checkpointing_steps", "1"])
    reset_accelerate()
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--method", "ether"], "--method: was 'ether_plus' in .*checkpoint-2 and is 'ether' now"),
        (["--num_blocks", "2"], "--num_blocks: was 1 .* is 2 now"),
        (["--seed", "3"], "--seed: was 0 .* is 3 now"),
        (["--train_batch_size", "2"], "--train_batch_size: was 4 .* is 2 now"),
        (["--learning_rate", "0.01"], "--learning_rate: was 0.05 .* is 0.01 now"),
        (["--instance_prompt", "a dog"], "--instance_prompt: was 'a photo of sks toy' .* is 'a dog' now"),
        (["--mixed_precision", "bf16"], "--mixed_precision: was 'no' .* is 'bf16' now"),
        (["--train_text_encoder"], "--train_text_encoder: was False .* is True now"),
        (["--instance_data_dir", "{images}"], "--instance_data_dir: was 'sha256:.* is 'sha256:"),
        (["--max_train_steps", "1"], "--max_train_steps: was 2 .* is 1 now; it may only grow"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: there is no such folder"),
        (["--resume_from_checkpoint", "{images}"], "is no whole checkpoint .*checkpoint.json"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps: got 0, needs a whole number from 1"),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit: got 0, needs a whole number from 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0].removeprefix("--"),
)
def test_what_cannot_go_on_is_told_before_any_weights_are_read(
    script, flags, stopped, tmp_path, monkeypatch, capsys, changed, message
):
    subjects()[1].view(0).render().image.save(tmp_path / "other.png")
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    changed = [word.format(images=tmp_path) for word in changed]
    given = [*flags, "--output_dir", str(stopped), "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit):
        script.main([*given, *changed])
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


def test_an_adapter_may_lie_in_the_folder_of_its_base(script, flags, tmp_path):
    model = Path(shutil.copytree(miniature.FOLDER, tmp_path / "model"))
    flags = [*flags, "--pretrained_model_name_or_path", str(model), "--output_dir", str(model / "adapters" / "toy")]
    for steps_in_all in ("2", "3"):
        reset_accelerate()
        more = ["--max_train_steps", steps_in_all, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest"]
        result = script.main([*flags, *more])
    assert len(result.losses) == 3 and steps(model / "adapters" / "toy") == [1, 2, 3]


def test_flags_that_the_adapter_does_not_depend_on_may_change(script, flags, stopped, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(stopped, folder)
    images = Path(shutil.copytree(flags[flags.index("--instance_data_dir") + 1], tmp_path / "pictures"))
    result = script.main(
        [*flags, "--output_dir", str(folder), "--max_train_steps", "3", "--resume_from_checkpoint", "latest",
         "--num_inference_steps", "2", "--instance_data_dir", str(images), "--checkpoints_total_limit", "1"]
    )  # fmt: skip
    assert len(result.losses) == 3


@pytest.mark.parametrize(("limit", "count"), [([], 201), (["--checkpoints_total_limit", "3"], 4)])
def test_a_full_disk_is_told_before_any_weights_are_read(script, flags, tmp_path, monkeypatch, capsys, limit, count):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    with pytest.raises(SystemExit):
        script.main([*flags, "--output_dir", str(tmp_path), "--checkpointing_steps", "1", *limit])
    assert f"5 MB are free, but {count} checkpoints and the adapter need up to" in capsys.readouterr().err
