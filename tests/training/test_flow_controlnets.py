"""`train_controlnet_ether.py --control_type controlnet` on transformers, from the command line to stock pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.control_data import label_map, write
from helpers.controlnets import NAMES, make_deep
from helpers.scripts import in_process

from ether_diffusion.training import control
from ether_diffusion.training.run import LoadedRun

OWN = {
    "flux": {"controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder"},
    "sd3": {"controlnet_blocks", "pos_embed_input"},
}
KINDS = {"flux": "FluxControlNetModel", "sd3": "SD3ControlNetModel"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("net pairs") / "data")


@pytest.fixture(scope="session")
def deep_bases(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in NAMES:
        made[name] = tmp_path_factory.mktemp(name) / name
        make_deep(name, made[name].parent).save_pretrained(made[name])
    return made


@pytest.fixture
def train(pairs, deep_bases, tmp_path):
    """The script's own main, in this process: train(name, *flags, output=…) -> (result, output folder)."""
    usual = {"--train_data_dir": pairs, "--max_train_steps": 3, "--num_validation_images": 0, "--resolution": 16}
    call = in_process(control.main, {**usual, "--learning_rate": 0.02, "--control_lr": 0.02}, tmp_path)

    def train(name: str, *flags, **more):
        base = ["--pretrained_model_name_or_path", deep_bases[name], "--control_type", "controlnet"]
        return call(*base, *flags, **more)

    return train


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def generated(monkeypatch) -> dict[str, np.ndarray]:
    """What the trainer's own model generates when its run begins and when it ends."""
    seen, train, finish = {}, LoadedRun.train, LoadedRun.finish

    def generate_and_train(loaded, *args, **kwargs):
        loaded.family.complete()
        seen["start"] = generate(loaded.attached.pipe)
        return train(loaded, *args, **kwargs)

    def generate_and_finish(loaded, *args, **kwargs):
        seen["trainer"] = generate(loaded.attached.pipe)
        return finish(loaded, *args, **kwargs)

    monkeypatch.setattr(LoadedRun, "train", generate_and_train)
    monkeypatch.setattr(LoadedRun, "finish", generate_and_finish)
    return seen


def generate(pipe, seed: int = 3) -> np.ndarray:
    """An image under control, of noise that does not depend on the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    inputs = {"output_type": "np", "num_inference_steps": 2, "height": 32, "width": 32}
    if "controlnet" in pipe.components:
        inputs["control_image"] = label_map(32, 32, seed)
    generator = torch.Generator().manual_seed(0)
    return (
        family_of_stock(pipe)
        .generate(["a dog"], pipe=pipe, generator=generator, guidance_scale=2.0, **inputs)
        .images[0]
    )


def family_of_stock(pipe):
    """The family of a stock pipeline, with a ControlNet or without."""
    kind = next(kind for kind in NAMES_OF if type(pipe).__name__ in NAMES_OF[kind])
    return family_classes()[kind](pipe)
