"""One door for all errors that a user can cause: one line, an exit code, no traceback, and nothing half done."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import control_data
from helpers.scripts import refusal, same

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training import control


@pytest.fixture
def base(tmp_path, tiny_pipeline_folder) -> Path:
    """A base model to break."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "base"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)


SIZES = [None, [8, 6], [], "8", 8.5, 0, -8, True, {"height": 8}]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("script", ["dreambooth", "control"])
def test_a_base_without_one_size_is_one_sentence(train, base, tmp_path, capsys, no_loading, script, size):
    change(base / "unet" / "config.json", sample_size=size)
    flags = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")]
    if script == "control":
        train, flags = control.main, [[*flags, "--train_data_dir", str(control_data.write(tmp_path / "pairs"))]]
    error = refusal(capsys, train, *flags)
    assert "sample_size" in error and "needs one whole number from 1" in error
    assert not (tmp_path / "out").exists()


def test_a_size_given_as_two_equal_sides_is_a_size(train, base):
    change(base / "unet" / "config.json", sample_size=[8, 8])
    flags = ["--pretrained_model_name_or_path", base, "--num_validation_images", 1, "--num_inference_steps", 1]
    one, two = train(output="usual")[1], train(*flags, output="pair")[1]
    assert same(one, two) and (two / "grid.png").is_file()


def break_tokenizer(base: Path, kind: str) -> None:
    index = json.loads((base / "model_index.json").read_text())
    if kind == "no folder":
        shutil.rmtree(base / "tokenizer")
    elif kind == "null in the index":
        (base / "model_index.json").write_text(json.dumps({**index, "tokenizer": [None, None]}))
    elif kind == "not in the index":
        (base / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "tokenizer"}))
    elif kind == "empty folder":
        for file in (base / "tokenizer").iterdir():
            file.unlink()
    elif kind == "damaged":
        for file in (base / "tokenizer").glob("*.json"):
            file.write_bytes(file.read_bytes()[:20])
    else:
        change(base / "text_encoder" / "config.json", vocab_size=50)


@pytest.mark.parametrize(
    "kind", ["no folder", "null in the index", "not in the index", "empty folder", "damaged", "too many tokens"]
)
def test_a_base_without_its_tokenizer_is_one_sentence_before_weights_are_read(train, base, capsys, no_loading, kind):
    break_tokenizer(base, kind)
    error = refusal(capsys, train, "--pretrained_model_name_or_path", base)
    assert f"--pretrained_model_name_or_path {base}" in error and "tokenizer" in error


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_every_seed_that_is_taken_trains_and_generates(train, seed):
    flags = ["--seed", seed, "--num_validation_images", 2, "--num_inference_steps", 1, "--max_train_steps", 1]
    assert (train(*flags)[1] / "grid.png").is_file()


@pytest.mark.parametrize("seed", [2**64, 10**30, -1])
def test_a_seed_beyond_is_one_sentence(train, capsys, no_loading, seed):
    words = "needs a whole number from 0 to 18446744073709551615"
    assert f"--seed: got {seed}, {words}" in refusal(capsys, train, "--seed", seed)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\\u2028"])
def test_a_caption_may_hold_what_only_some_take_for_the_end_of_a_line(train, photographs, tmp_path, separator):
    folder = Path(shutil.copytree(photographs, tmp_path / "photos"))
    lines = [f'{{"file_name": "{k}.png", "text": "a{separator}toy"}}' for k in range(3)]
    (folder / "metadata.jsonl").write_text("\r\n".join(lines), "utf-8")
    train("--instance_data_dir", folder, "--max_train_steps", 1)


# Ctrl-C -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(k): the k-th call of a pipeline is met by Ctrl-C."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    generate = StableDiffusionPipeline.__call__

    def at(call: int) -> None:
        calls = iter(range(1, 1000))

        def interrupted(self, *args, **kwargs):
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return generate(self, *args, **kwargs)

        monkeypatch.setattr(StableDiffusionPipeline, "__call__", interrupted)

    yield at
    signal.signal(signal.SIGINT, found)


PRIOR = "--with_prior_preservation --class_prompt toys --num_class_images 3 --sample_batch_size 1 --class_data_dir {}"
SAMPLES = "--num_validation_images 1 --num_inference_steps 1"
STAGES = {
    "class images": (2, f"{PRIOR} {SAMPLES}", "1 of 3 images are in "),
    "first images": (1, SAMPLES, ""),
    "images during the training": (2, f"{SAMPLES} --validation_steps 1", "after step 2 of 3, saved as"),
    "last images": (2, SAMPLES, ""),
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_is_one_line_at_every_stage_and_the_run_goes_on(train, tmp_path, interrupt, capsys, monkeypatch, stage):
    call, flags, words = STAGES[stage]
    flags = [*flags.format(tmp_path / "class").split(), "--checkpointing_steps", 3]
    interrupt(call)
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    lines = capsys.readouterr().err.split("\n")
    (line,) = [line for line in lines if "stopped by SIGINT" in line]
    assert stop.value.code == 130 and words in line and line.endswith("--resume_from_checkpoint latest")
    assert not [line for line in lines if "Traceback" in line or line.startswith("  File")]
    assert (tmp_path / "out" / WEIGHTS_NAME).exists() == (stage == "last images")
    monkeypatch.undo()
    train(*flags, "--resume_from_checkpoint", "latest")
    again = train(*flags, output="whole")[1]
    assert same(tmp_path / "out", again)


# What else may stop a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("two\n  lines"), 2, "error: two lines"),
        (InputError("an \x1b[31mescape"), 2, "error: an \\x1b[31mescape"),
        (OSError("the disk is full"), 1, "error: the disk is full"),
        (FloatingPointError("not finite"), 1, "error: not finite"),
        (MemoryError("of 8 GB"), 1, "error: the memory is not enough (of 8 GB); lower --train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: the memory is not enough (CUDA out of memory.); "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, "error: the memory is not enough (Default"),
    ],
)
def test_what_a_run_cannot_help_is_one_line(train, monkeypatch, capsys, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == code and line.startswith(words)


def test_a_fault_of_the_code_keeps_its_traceback(train, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        train("--num_validation_images", 1)


def test_class_images_that_are_taken_away_meanwhile_are_one_line(train, tmp_path, monkeypatch, capsys):
    generate = StableDiffusionPipeline.__call__

    def remove(self, *args, **kwargs):
        for path in (tmp_path / "class").glob("class-*.png"):
            path.unlink()
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", remove)
    with pytest.raises(SystemExit) as stop:
        train(*PRIOR.format(tmp_path / "class").split())
    assert stop.value.code == 1 and "error: images were removed while" in capsys.readouterr().err
