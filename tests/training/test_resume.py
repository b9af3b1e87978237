"""A run of the script that was stopped, in whatever way, and goes on ends as one that was never stopped."""

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
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.scripts import DREAMBOOTH, refusal, reset_accelerate, same
from safetensors import safe_open
from safetensors.torch import load_file

from ether_diffusion import miniature
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.miniature.world import subjects
from ether_diffusion.training import dreambooth
from ether_diffusion.training.checkpoint_files import MANIFEST_NAME, STATE_NAME, VECTORS_NAME, find_checkpoints

QUICK = ["--num_validation_images", "0", "--learning_rate", "0.05", "--random_flip"]


@pytest.fixture(scope="session")
def flags(tiny_pipeline_folder, photographs) -> list[str]:
    """Flags of a run on the tiny pipeline, but for the output folder."""
    return [
        "--pretrained_model_name_or_path", str(tiny_pipeline_folder), "--instance_data_dir", str(photographs),
        "--instance_prompt", "a photo of sks toy", *QUICK,
    ]  # fmt: skip


def steps(folder: Path) -> list[int]:
    return [step for step, _ in find_checkpoints(folder)]


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


@pytest.mark.slow
def test_a_run_killed_twice_and_interrupted_once_ends_with_the_same_file(flags, tmp_path):
    flags = [*flags, "--max_train_steps", "150", "--checkpointing_steps", "7", "--lr_scheduler", "cosine"]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    dreambooth.main([*flags, "--output_dir", str(whole)])
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
    dreambooth.main([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    assert adapter(folder) == adapter(whole)


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
def test_with_every_kind_of_state_a_resumed_run_ends_with_the_same_file(flags, tmp_path, more):
    words = [*flags, "--max_train_steps", "5", "--checkpointing_steps", "2", *more.split()]
    folders = tmp_path / "whole", tmp_path / "resumed"
    whole = dreambooth.main([*words, "--output_dir", str(folders[0])])
    folders[1].mkdir()
    shutil.copytree(folders[0] / "checkpoint-2", folders[1] / "checkpoint-2")
    reset_accelerate()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    again = dreambooth.main([*words, "--output_dir", str(folders[1]), "--resume_from_checkpoint", "latest"])
    assert same(*folders) and again.losses == whole.losses


def test_dropout_goes_on_where_it_was(flags, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.5, "target_modules": ["to_q", "to_v"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    test_with_every_kind_of_state_a_resumed_run_ends_with_the_same_file(
        flags, tmp_path, f"--adapter_config {tmp_path / 'config.json'} --validation_steps 1"
        " --num_validation_images 1 --num_inference_steps 1"
    )  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_at_random_times_change_no_bit(flags, tmp_path):
    flags = [*flags, "--max_train_steps", "60", "--checkpointing_steps", "7", "--checkpoints_total_limit", "2"]
    whole = tmp_path / "whole"
    result = dreambooth.main([*flags, "--output_dir", str(whole)])
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
        dreambooth.main([*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
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


def test_a_checkpoint_holds_the_trained_vectors_their_moments_and_nothing_of_the_model(flags, tmp_path):
    dreambooth.main([*flags, "--output_dir", str(tmp_path), "--max_train_steps", "2", "--checkpointing_steps", "2"])
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
def stopped(flags, tmp_path_factory) -> Path:
    """The output folder of a run with a checkpoint after its first step."""
    folder = tmp_path_factory.mktemp("stopped")
    reset_accelerate()
    dreambooth.main([*flags, "--output_dir", str(folder), "--max_train_steps", "2", "--checkpointing_steps", "1"])
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
        (["--resume_from_checkpoint", "{images}"], "is no complete training checkpoint .*checkpoint.json"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps: got 0, needs a whole number from 1"),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit: got 0, needs a whole number from 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0].removeprefix("--"),
)
def test_what_cannot_go_on_is_told_before_any_weights_are_read(
    flags, stopped, tmp_path, monkeypatch, capsys, changed, message
):
    subjects()[1].view(0).render().image.save(tmp_path / "other.png")
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    changed = [word.format(images=tmp_path) for word in changed]
    given = [*flags, "--output_dir", str(stopped), "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit):
        dreambooth.main([*given, *changed])
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


def test_an_adapter_may_lie_in_the_folder_of_its_base(flags, tmp_path):
    model = Path(shutil.copytree(miniature.FOLDER, tmp_path / "model"))
    flags = [*flags, "--pretrained_model_name_or_path", str(model), "--output_dir", str(model / "adapters" / "toy")]
    for steps_in_all in ("2", "3"):
        reset_accelerate()
        more = ["--max_train_steps", steps_in_all, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest"]
        result = dreambooth.main([*flags, *more])
    assert len(result.losses) == 3 and steps(model / "adapters" / "toy") == [1, 2, 3]


def test_flags_that_the_adapter_does_not_depend_on_may_change(flags, stopped, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(stopped, folder)
    images = Path(shutil.copytree(flags[flags.index("--instance_data_dir") + 1], tmp_path / "images"))
    result = dreambooth.main(
        [*flags, "--output_dir", str(folder), "--max_train_steps", "3", "--resume_from_checkpoint", "latest",
         "--num_inference_steps", "2", "--instance_data_dir", str(images), "--checkpoints_total_limit", "1"]
    )  # fmt: skip
    assert len(result.losses) == 3


@pytest.mark.parametrize(("limit", "count"), [([], 201), (["--checkpoints_total_limit", "3"], 4)])
def test_a_full_disk_is_told_before_any_weights_are_read(flags, tmp_path, monkeypatch, capsys, limit, count):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    with pytest.raises(SystemExit):
        dreambooth.main([*flags, "--output_dir", str(tmp_path), "--checkpointing_steps", "1", *limit])
    assert f"5 MB are free, but {count} checkpoints and the adapter need up to" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["instance_data_dir", "class_data_dir"])
@pytest.mark.parametrize("meant", ["data", "instance_data_dir", "class_data_dir", None])
def test_changed_images_go_on_where_they_are_meant_by_name(train, tmp_path, capsys, changed, meant):
    folders = {name: tmp_path / name for name in ("instance_data_dir", "class_data_dir")}
    for k, folder in enumerate(folders.values()):
        folder.mkdir()
        for view in range(2):
            subjects()[k].view(view).render().image.save(folder / f"{view}.png")
    words = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
    flags = (*words, "--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 2)
    train(*flags, "--max_train_steps", 1, "--checkpointing_steps", 1)
    subjects()[2].view(0).render().image.save(folders[changed] / "0.png")
    flags = (*flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    flags += () if meant is None else ("--resume_with_changed", meant)
    if meant in ("data", changed):
        assert len(train(*flags)[0].losses) == 2
    else:
        assert f"--{changed}: was 'sha256:" in refusal(capsys, train, *flags)
