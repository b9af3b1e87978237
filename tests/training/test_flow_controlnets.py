"""`train_controlnet_ether.py --control_type controlnet` on transformers, from the command line to stock pipelines."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.control_data import label_map, write
from helpers.controlnets import NAMES, controlnets_of, make_deep
from helpers.flow_images import generate as flow_generate
from helpers.pipelines import ONE_GREY_LEVEL
from helpers.scripts import CONTROLNET, STEADY, in_process, launch, refusal, same, tensors
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.control.controlnets import with_controlnet
from ether_diffusion.training import control
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.run import LoadedRun

OWN = {
    "flux": {"controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder"},
    "sd3": {"controlnet_blocks", "pos_embed_input"},
}
HEAVY = ["sd3", pytest.param("flux", marks=pytest.mark.slow)]
SLOW = partial(pytest.param, marks=pytest.mark.slow)
KINDS = {"flux": "FluxControlNetModel", "sd3": "SD3ControlNetModel"}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("nets") / "data")


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
    usual = {"--train_data_dir": pairs, "--max_train_steps": 2, "--num_validation_images": 0, "--resolution": 16}
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
    """An image under control, if the pipeline has any, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    shape = (1, 64, 16) if type(pipe).__name__.startswith("Flux") else (1, 4, 16, 16)
    inputs = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(0)), "guidance_scale": 2.0}
    if "controlnet" in pipe.components:
        inputs["control_image"] = label_map(32, 32, seed)
    return flow_generate(pipe, **inputs)


@pytest.mark.parametrize("method", ["ether_plus", "full", SLOW("none"), SLOW("ether"), SLOW("lora")])
def test_a_merged_controlnet_generates_in_a_stock_pipeline_what_the_trainer_generated(
    name, method, train, generated, deep_bases
):
    rate = [] if method == "none" else ["--learning_rate", 0.01]
    result, folder = train(name, "--method", method, *rate, "--train_batch_size", 2)
    assert np.isfinite(result.losses).all()
    base = DiffusionPipeline.from_pretrained(deep_bases[name])
    base.transformer.requires_grad_(False)  # PyTorch may round otherwise
    assert np.array_equal(generated["start"], generate(base))
    controlnet = getattr(diffusers, KINDS[name]).from_pretrained(folder / "controlnet")
    assert not any("lora" in key or "ether" in key for key, _ in controlnet.named_parameters())
    assert str(deep_bases[name].parent) not in (folder / "controlnet" / "config.json").read_text()
    merged = with_controlnet(base, controlnet)
    assert np.abs(generate(merged) - generated["trainer"]).max() <= ONE_GREY_LEVEL
    assert np.abs(generate(merged, seed=8) - generated["trainer"]).max() > ONE_GREY_LEVEL
    assert (folder / WEIGHTS_NAME).exists() == (method in ("none", "ether", "ether_plus"))


@pytest.mark.parametrize("method", ["ether_plus", SLOW("none")])
def test_the_small_file_does_the_same_on_a_copy_and_comes_off_again(name, method, train, generated, deep_bases):
    rate = [] if method == "none" else ["--learning_rate", 0.01]
    _, folder = train(name, "--method", method, *rate)
    saved = load_file(folder / WEIGHTS_NAME)
    parts = {key.split(".")[1] for key in saved if "ether_" not in key}
    assert parts == OWN[name] and all(key.startswith("controlnet.") for key in saved)
    count = sum(tensor.numel() for tensor in saved.values())
    assert f"| trained parameters | {count:,} |" in (folder / "README.md").read_text()
    base = DiffusionPipeline.from_pretrained(deep_bases[name])
    pipe = with_controlnet(base, controlnets_of(base).copy_of(base.transformer))
    before = {key: tensor.clone() for key, tensor in pipe.controlnet.state_dict().items()}
    pipe.load_ether_weights(folder)
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= ONE_GREY_LEVEL
    pipe.unload_ether_weights()
    after = pipe.controlnet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)


def test_the_code_on_the_card_generates_under_control(name, train, deep_bases, tmp_path, monkeypatch):
    base = DiffusionPipeline.from_pretrained(deep_bases[name])
    if name == "sd3":  # as some are saved, without T5
        base.register_modules(text_encoder_3=None, tokenizer_3=None)
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train(name, "--pretrained_model_name_or_path", tmp_path / "base")
    code = re.search(r"```python\n(.*?)\n```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    more = ", num_inference_steps=1, height=32, width=32, max_sequence_length=32).images"
    exec(code.replace("=control).images", f"=control{more}"), names)
    assert names["image"].size == (32, 32) and KINDS[name] in code


@pytest.mark.parametrize("layers", [(1, 0), (0, 2)])
def test_layers_are_copied_as_the_flags_say(train, layers):
    _, folder = train("flux", "--num_double_layers", layers[0], "--num_single_layers", layers[1])
    config = json.loads((folder / "controlnet" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == layers


@pytest.mark.parametrize("name", HEAVY, indirect=True)
def test_a_controlnet_to_start_from_is_taken(name, train):
    first = train(name, output="first")[1]
    flags = ["--controlnet_model_name_or_path", first / "controlnet", "--learning_rate", 1e-9, "--control_lr", 1e-9]
    again = load_file(train(name, *flags, output="again")[1] / "controlnet" / "diffusion_pytorch_model.safetensors")
    start = load_file(first / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert start.keys() == again.keys()
    assert all(torch.allclose(again[key], start[key], atol=1e-5) for key in start)


@pytest.mark.parametrize(
    "more",
    [
        "--method ether_plus --use_ema --proportion_empty_prompts 0.5 --gradient_checkpointing",
        SLOW("--method none --random_flip"),
        "--method full --mixed_precision bf16 --cache_latents --center_crop --offload",
    ],
)
@pytest.mark.parametrize("name", HEAVY, indirect=True)
def test_a_resumed_run_ends_with_the_same_file(name, train, tmp_path, more):
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, *more.split()]
    whole, folder = train(name, *flags, output="whole")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(folder / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    named = ["--num_double_layers", {"flux": 3, "sd3": 2}[name]]  # the default, by its number
    again, _ = train(name, *flags, *named, "--resume_from_checkpoint", "latest", output="resumed")
    assert again.losses == whole.losses and same(folder, tmp_path / "resumed")


@pytest.mark.parametrize(
    "flags",
    [["--cache_latents", "--center_crop"], SLOW(["--gradient_checkpointing"]), SLOW(["--offload"])],
    ids=lambda f: f[0],
)
@pytest.mark.parametrize("name", HEAVY, indirect=True)
def test_what_saves_memory_changes_nothing_that_is_learned(name, train, flags):
    kept = [flag for flag in flags if flag == "--center_crop"]
    usual, changed = (train(name, *STEADY, *more, output=k)[1] for k, more in (("usual", kept), ("changed", flags)))
    for key, value in tensors(usual).items():
        torch.testing.assert_close(tensors(changed)[key], value, atol=1e-5, rtol=1e-4)


def test_text_encoders_go_before_the_transformer_comes_and_cached_latents_are_all_it_needs(name, train, monkeypatch):
    seen, component = [], FlowFamily.component

    def watch(self, asked):
        found = component(self, asked)
        if self._skeletons:
            seen.append((asked, set(self.modules())))
        return found

    monkeypatch.setattr(FlowFamily, "component", watch)
    train(name, "--cache_latents", "--center_crop")
    encoders = {each for _, names in seen for each in names if each.startswith("text_encoder")}
    late = [(asked, names) for asked, names in seen if "transformer" in names]
    assert encoders and late
    assert not any(asked == "vae" or names & encoders for asked, names in late)


@pytest.mark.parametrize("precision", ["bf16", SLOW("no")])
def test_sample_images_show_control_base_and_controlled(name, train, monkeypatch, precision):
    seen, finish = [], LoadedRun.finish
    monkeypatch.setattr(LoadedRun, "finish", lambda loaded, *a, **k: (seen.append(loaded), finish(loaded, *a, **k))[1])
    flags = ["--num_validation_images", 1, "--num_inference_steps", 2, "--validation_steps", 1]
    result, folder = train(name, "--mixed_precision", precision, *flags)
    assert np.isfinite(result.losses).all()
    grids = [np.asarray(Image.open(folder / path)) for path in ("validation/step-000001.png", "grid.png")]
    assert grids[0].shape == grids[1].shape and not np.array_equal(*grids) and grids[1].std() > 10
    models = [seen[0].attached.pipe.transformer, *seen[0].attached.models.values()]
    dtypes = {(each.requires_grad, each.dtype) for model in models for each in model.parameters()}
    assert (True, torch.float32) in dtypes and (True, torch.bfloat16) not in dtypes
    assert ((False, torch.bfloat16) in dtypes) == (precision == "bf16")


def test_a_dry_run_tells_of_the_controlnet(name, train, capsys, tmp_path):
    assert train(name, "--dry_run")[0] is None
    told = capsys.readouterr().out
    assert "ETHER+ on controlnet: " in told and re.search(r"^  controlnet +\d", told, re.MULTILINE), told
    assert not (tmp_path / "out").exists()


BAD = [
    ("--num_double_layers 4", "--num_double_layers: got 4; of the transformer's 3 blocks, 0, 1, 2, 3 fit"),
    ("--num_double_layers -1", "--num_double_layers: got -1, needs a whole number from 0"),
    ("--num_double_layers 1 --control_type light", "--num_double_layers: has no effect without --control_type contr"),
    ("--num_single_layers 1 --controlnet_model_name_or_path x", "--num_single_layers: has no effect with --control"),
    ("--quantize nf4", "--quantize nf4: a ControlNet begins as a copy of the weights"),
    ("--train_text_encoder", "--train_text_encoder: has no effect with --control_type controlnet"),
    ("--controlnet_model_name_or_path {pairs}", "cannot be read as a ControlNet"),
    ("--controlnet_model_name_or_path {sd3}", "cannot be read as a ControlNet: it is a SD3ControlNetModel, needs a F"),
    ("--mixed_precision fp16", "--mixed_precision fp16: --control_type controlnet needs a GPU"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_a_wrong_flag_is_one_clear_error_and_nothing_is_loaded_or_written(
    train, pairs, deep_bases, tmp_path, monkeypatch, capsys, flags, message
):
    if "{sd3}" in flags:
        base = DiffusionPipeline.from_pretrained(deep_bases["sd3"])
        controlnets_of(base).copy_of(base.transformer).save_pretrained(tmp_path / "sd3")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    error = refusal(capsys, train, "flux", *flags.format(pairs=pairs, sd3=tmp_path / "sd3").split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("other", "end"), [("z_image", "; --control_type light fits here"), ("kontext", "")])
def test_families_without_controlnets_are_refused_with_the_names_of_those_that_have_them(
    other, end, train, flow_bases, capsys
):
    error = refusal(capsys, train, "flux", "--pretrained_model_name_or_path", flow_bases(other))
    those = "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline"
    assert f"Pipeline: ControlNets are trained for {those}{end}" in error


def test_the_number_of_layers_of_a_transformer_is_none_of_a_unet(train, bases, capsys):
    flags = ["--pretrained_model_name_or_path", bases["sd"], "--num_double_layers", 1]
    assert "--num_double_layers: has no effect on a ControlNetModel" in refusal(capsys, train, "flux", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ether_plus", "full"])
def test_the_script_trains_in_two_processes_as_in_one(name, method, pairs, deep_bases, tmp_path):
    common = ["--pretrained_model_name_or_path", deep_bases[name], "--control_type", "controlnet", "--resolution", 16]
    common += ["--train_data_dir", pairs, "--max_train_steps", 2, "--num_validation_images", 0, "--method", method]
    one = launch(CONTROLNET, *common, *STEADY, "--train_batch_size", 4, "--output_dir", tmp_path / "one")
    two = launch(CONTROLNET, *common, *STEADY, "--train_batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for key, value in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "two")[key], value, atol=1e-5, rtol=1e-4)
