"""`train_dreambooth_ether.py` from end to end, as a user calls it."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.scripts import DREAMBOOTH, STEADY, launch, vectors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.tuner.attention import EtherAttnProcessor

PROMPT = "a photo of sks toy"


def generate(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images[0]


def test_the_command_of_the_readme_trains_saves_generates_and_describes(photographs, tiny_pipeline_folder, tmp_path):
    flags = ["--pretrained_model_name_or_path", str(tiny_pipeline_folder), "--instance_data_dir", str(photographs)]
    flags += ["--instance_prompt", PROMPT, "--output_dir", str(tmp_path / "toy"), "--max_train_steps", "4"]
    flags += ["--num_validation_images", "2", "--num_inference_steps", "3", "--report_to", "tensorboard"]
    flags += ["--train_text_encoder", "--gradient_checkpointing", "--gradient_accumulation_steps", "2"]
    flags += ["--validation_prompt", "sks toy", "toy"]
    done = launch(DREAMBOOTH, *flags)
    assert done.returncode == 0, done.stderr
    assert "training: 100%" in done.stderr and "loss=" in done.stderr
    folder = tmp_path / "toy"
    assert {"README.md", "grid.png", WEIGHTS_NAME, "logs"} == {p.name for p in folder.iterdir()}
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    card = (folder / "README.md").read_text()
    assert "accelerate launch train_dreambooth_ether.py" in card and PROMPT in card and "grid.png" in card
    assert "--validation_prompt 'sks toy' toy" in card
    assert Image.open(folder / "grid.png").size[1] > 4 * 128
    tensors = load_file(folder / WEIGHTS_NAME)
    assert {key.partition(".")[0] for key in tensors} == {"unet", "text_encoder"}
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        document = json.loads(file.metadata()["ether"])
    assert document["prompt"] == PROMPT and document["base_model"] == tiny_pipeline_folder.name


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_the_saved_adapter_generates_what_the_trainer_generated(train, tiny_pipeline_folder, method, monkeypatch):
    generated = {}
    save = StableDiffusionPipeline.save_ether_weights

    def save_and_generate(pipe, *args, **kwargs):
        generated["trainer"] = generate(pipe)
        return save(pipe, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "save_ether_weights", save_and_generate)
    _, folder = train("--method", method, "--num_blocks", "2", "--train_text_encoder")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    base = generate(pipe)
    pipe.load_ether_weights(folder)
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= 1 / 255
    pipe.fuse_ether()
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= 1 / 255
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe), base)


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_two_runs_with_one_seed_give_the_same_adapter_bit_for_bit(train, method):
    flags = ["--method", method, "--random_flip", "--train_text_encoder"]
    files = [load_file(train(*flags, output=name)[1] / WEIGHTS_NAME) for name in ("first", "second")]
    other = load_file(train(*flags, "--seed", "1", output="third")[1] / WEIGHTS_NAME)
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    assert not all(torch.equal(tensor, other[key]) for key, tensor in files[0].items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate", "0.01"],
        ["--train_batch_size", "2"],
        ["--gradient_accumulation_steps", "2"],
        ["--center_crop", "--resolution", "12"],
        ["--resolution", "24"],
        ["--random_flip"],
        ["--max_grad_norm", "0.0001"],
        ["--adam_beta1", "0.1"],
        ["--adam_beta2", "0.5"],
        ["--adam_weight_decay", "0.5"],
        ["--adam_epsilon", "0.1"],
        ["--lr_scheduler", "linear"],
        ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "3"],
        ["--max_train_steps", "2"],
        ["--instance_prompt", "another prompt"],
        ["--mixed_precision", "bf16"],
        ["--method", "ether"],
    ],
    ids=lambda flags: "-".join(flags).replace("--", ""),
)
def test_every_flag_changes_what_is_learned(train, flags):
    usual, changed = vectors(train(output="usual")[1]), vectors(train(*flags, output="changed")[1])
    assert usual.shape != changed.shape or not torch.equal(usual, changed)


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--target_modules", "to_q"], {"to_q"}),
        (
            ["--train_text_encoder", "--text_encoder_target_modules", "fc1"],
            {"to_q", "to_k", "to_v", "to_out.0", "fc1"},
        ),
    ],
)
def test_target_modules_choose_the_layers(train, flags, keys):
    names = load_file(train(*flags)[1] / WEIGHTS_NAME)
    paths = {name.rpartition(".")[0] for name in names}
    assert {next(key for key in keys if path.endswith(f".{key}")) for path in paths} == keys


def test_blocks_shape_the_vectors(train):
    tensors = load_file(train("--num_blocks", "4", "--method", "ether")[1] / WEIGHTS_NAME)
    assert {tensor.shape[0] for tensor in tensors.values()} == {4}


def test_gradient_checkpointing_changes_memory_and_not_the_result(train):
    plain = vectors(train(output="plain")[1])
    torch.testing.assert_close(
        vectors(train("--gradient_checkpointing", output="less")[1]), plain, rtol=1e-4, atol=1e-5
    )


def test_the_attention_backend_changes_the_processor_and_not_the_result(train, monkeypatch):
    plain, used = vectors(train(output="plain")[1]), []
    call = EtherAttnProcessor.__call__
    monkeypatch.setattr(EtherAttnProcessor, "__call__", lambda *a, **k: (used.append(a[0].backend), call(*a, **k))[1])
    torch.testing.assert_close(vectors(train("--attention_backend", "sdpa", output="own")[1]), plain)
    assert set(used) == {"sdpa"}


@pytest.mark.parametrize("kind", ["empty", "not an image", "truncated"])
def test_bad_images_are_named_before_any_weights_are_read(train, tmp_path, monkeypatch, capsys, kind):
    folder = tmp_path / "photographs"
    folder.mkdir()
    if kind != "empty":
        Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "good.jpg")
        content = (folder / "good.jpg").read_bytes()
        (folder / "bad.jpg").write_bytes(b"hello" if kind == "not an image" else content[: len(content) // 2])
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    message = {"empty": "no image", "not an image": "bad.jpg: is not", "truncated": "bad.jpg: .*truncated"}[kind]
    with pytest.raises(SystemExit):
        train("--instance_data_dir", str(folder))
    assert re.search(message, capsys.readouterr().err)


def test_an_absolute_logging_dir_is_taken_as_it_is(train, tmp_path):
    train("--report_to", "tensorboard", "--logging_dir", str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(photographs, tiny_pipeline_folder, tmp_path):
    flags = ["--pretrained_model_name_or_path", str(tiny_pipeline_folder), "--instance_data_dir", str(photographs)]
    flags += ["--instance_prompt", PROMPT, "--max_train_steps", "4", "--num_validation_images", "0", *STEADY]
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        more = ["--train_batch_size", batch, "--output_dir", folder]
        done = launch(DREAMBOOTH, *flags, *more, processes=processes)
        assert done.returncode == 0, done.stderr
        assert f"{processes} process" in done.stderr
    torch.testing.assert_close(vectors(tmp_path / "2"), vectors(tmp_path / "1"), rtol=1e-3, atol=1e-4)
