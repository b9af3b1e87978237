"""Going on compares what the result depends on: not how a thing is spelled, where it lies, or what saves memory."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import control_data
from helpers.scripts import in_process, refusal, same

from ether_diffusion.base_models import MINIATURES
from ether_diffusion.training import control
from ether_diffusion.training.dependence import dependence

RESUME = ("--resume_from_checkpoint", "latest")
STEPS = ("--max_train_steps", 4, "--checkpointing_steps", 2)


@pytest.fixture
def go_on(train, tmp_path, monkeypatch):
    """go_on(flags before, flags after) -> (folder of a run that never stopped, folder of one that changed flags)."""

    def call(before, after):
        _, whole = train(*STEPS, *before, output="whole")
        (tmp_path / "resumed").mkdir()
        shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        _, resumed = train(*STEPS, *after, *RESUME, output="resumed")
        return whole, resumed

    return call


@pytest.mark.parametrize("spelled", ["base/", "./base", "{absolute}", "link", "moved"])
def test_the_same_base_spelled_otherwise_is_the_same(go_on, tmp_path, monkeypatch, tiny_pipeline_folder, spelled):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pipeline_folder, "base")
    shutil.copytree(tiny_pipeline_folder, "moved")
    os.symlink("base", "link")
    base = "--pretrained_model_name_or_path"
    assert same(*go_on([base, "base"], [base, spelled.format(absolute=tmp_path / "base"), "--revision", "main"]))


def test_another_base_of_the_same_name_is_another(
    train, tmp_path, capsys, tiny_pipeline_folder, wider_pipeline_folder
):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline_folder, base)
    train(*STEPS, "--pretrained_model_name_or_path", base)
    shutil.rmtree(base)
    shutil.copytree(wider_pipeline_folder, base)
    error = refusal(capsys, train, *STEPS, *RESUME, "--pretrained_model_name_or_path", base)
    assert "--pretrained_model_name_or_path: was" in error


MEMORY = ["--gradient_checkpointing", "--pre_compute_text_embeddings", "--offload", "--cache_latents --center_crop"]


@pytest.mark.parametrize(("flags", "turned"), [*((flags, "on") for flags in MEMORY), (MEMORY[0], "off")])
def test_what_saves_memory_alone_may_change(go_on, flags, turned):
    kept = [flag for flag in flags.split() if flag == "--center_crop"]
    pair = (kept, flags.split())
    assert same(*go_on(*(pair if turned == "on" else reversed(pair))))


def test_fixed_places_of_crops_are_no_matter_of_memory_alone(train, capsys):
    train(*STEPS)
    assert "--cache_latents: was False" in refusal(capsys, train, *STEPS, *RESUME, "--cache_latents")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--train_data_dir pairs --streaming", "--train_data_dir ./pairs/ --streaming"),
        (
            "--train_data_dir pairs --control_type controlnet --controlnet_model_name_or_path net",
            "--train_data_dir ./pairs --control_type controlnet --controlnet_model_name_or_path ./net/",
        ),
        ("--train_data_dir pairs --aspect_ratio_buckets 16,16;16,32", "--aspect_ratio_buckets 16,16;016,32;"),
    ],
    ids=["stream", "controlnet", "buckets"],
)
def test_data_models_and_sizes_of_control_training_may_be_spelled_otherwise(
    tmp_path, monkeypatch, tiny_pipeline_folder, before, after
):
    monkeypatch.chdir(tmp_path)
    usual = {
        "--pretrained_model_name_or_path": tiny_pipeline_folder,
        "--train_data_dir": control_data.write(Path("pairs"), map_scale=1),
        "--num_validation_images": 0,
        "--max_train_steps": 2,
    }
    train = in_process(control.main, usual, tmp_path)
    if "net" in before.split():
        shutil.copytree(train("--control_type", "controlnet", output="first")[1] / "controlnet", "net")
    train(*before.split(), "--checkpointing_steps", 1)
    result, _ = train(*after.split(), *RESUME, "--max_train_steps", 3)
    assert len(result.losses) == 3


def test_a_checkpoint_says_the_same_with_and_without_options_at_their_defaults():
    run = {"pretrained_model_name_or_path": "default (sha256:ab)", "seed": 0, "method": "ether", "center_crop": True}
    older = {**run, "gradient_checkpointing": True, "pre_compute_text_embeddings": False, "cache_latents": True}
    newer = {**run, "pretrained_model_name_or_path": f"{MINIATURES['miniature']} (sha256:ab)", "new_flag": "default"}
    assert dependence(older) == dependence(newer) == dependence({**run, "another": False})
    for name, value in {"seed": 1, "method": "lora", "pretrained_model_name_or_path": "x (sha256:ac)"}.items():
        assert dependence({**run, name: value}) != dependence(run)


def test_both_names_of_the_xformers_backend_are_one():
    flag = {"enable_xformers_memory_efficient_attention": True, "attention_backend": "xformers"}
    assert dependence(flag) == dependence({"attention_backend": "xformers"}) != dependence({})
