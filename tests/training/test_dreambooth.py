"""`train_dreambooth_ether.py` from end to end, as a user calls it."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.pipelines import generate, open_pipeline
from helpers.scripts import DREAMBOOTH, STEADY, launch, same, vectors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.tuner.attention import EtherAttnProcessor

PROMPT = "a photo of sks toy"


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
    pipe = open_pipeline(tiny_pipeline_folder)
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
    first, second = (train(*flags, output=name)[1] for name in ("first", "second"))
    assert same(first, second) and not same(first, train(*flags, "--seed", "1", output="third")[1])


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
