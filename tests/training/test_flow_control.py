"""Light control of transformers with flow matching, from the script's command line to a pipeline."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.control_data import label_map, write
from helpers.flow_control import NAMES, REQUIRED
from helpers.flow_images import generate as flow_generate
from helpers.pipelines import ONE_GREY_LEVEL
from helpers.scripts import CONTROLNET, in_process, launch, refusal, same, tensors
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion import LatentControlEncoder, control_pipeline_class
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.training import control
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.run import LoadedRun

FEW_FIRST = [each if each in ("flux", "sd3") else pytest.param(each, marks=pytest.mark.slow) for each in REQUIRED]
"""Tokens and convolutions; the others are in the slow run."""


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("flow pairs") / "data")


@pytest.fixture
def train(pairs, tmp_path):
    """The script's own main, in this process: train(*flags, output=…) -> (result, output folder)."""
    usual = {"--train_data_dir": pairs, "--max_train_steps": 2, "--num_validation_images": 0}
    return in_process(control.main, {**usual, "--learning_rate": 0.05, "--control_lr": 0.05}, tmp_path)


@pytest.fixture(params=[name if name in REQUIRED else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def name(request) -> str:
    return request.param


@pytest.fixture
def generated(monkeypatch) -> dict[str, np.ndarray]:
    """What the trainer's own model generates at the end of a run, under "trainer"."""
    seen, finish = {}, LoadedRun.finish

    def generate_and_finish(loaded, *args, **kwargs):
        loaded.family.complete()
        seen["trainer"] = generate(loaded.attached.pipe)
        return finish(loaded, *args, **kwargs)

    monkeypatch.setattr(LoadedRun, "finish", generate_and_finish)
    return seen


def generate(pipe, seed: int | None = 3) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return flow_generate(pipe, **({} if seed is None else {"control_image": label_map(32, 32, seed)}))


def open_control(base: Path):
    stock = DiffusionPipeline.from_pretrained(base)
    return control_pipeline_class(type(stock)).from_pretrained(base)


@pytest.mark.parametrize("encoder", ["latent", "conv"])
def test_one_file_carries_light_control_and_generates_what_the_trainer_generated(
    name, on, train, generated, flow_bases, encoder
):
    result, folder = train(*on(name), "--control_encoder", encoder, "--train_batch_size", 2)
    assert np.isfinite(result.losses).all() and len(result.losses) == 2
    saved = load_file(folder / WEIGHTS_NAME)
    assert {key.partition(".")[0] for key in saved} == {"control_encoder", "transformer"}
    assert ("control_encoder.projection.weight" in saved) == (encoder == "latent")
    pipe = open_control(flow_bases(name))
    pipe.transformer.requires_grad_(False)
    before = generate(pipe, seed=None)
    pipe.load_ether_weights(folder)
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= ONE_GREY_LEVEL
    assert np.abs(generate(pipe, seed=8) - generated["trainer"]).max() > ONE_GREY_LEVEL
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe, seed=None), before)
    count = sum(tensor.numel() for tensor in saved.values())
    assert f"| trained parameters | {count:,} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["none", "ether", "lora", "oft", "full"])
def test_other_methods_train_and_the_code_on_the_card_generates(
    method, train, generated, flow_bases, tmp_path, monkeypatch
):
    shutil.copytree(flow_bases("sd3"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    rate = [] if method == "none" else ["--learning_rate", 0.01]
    base = ["--pretrained_model_name_or_path", tmp_path / "base", "--resolution", 16]
    train(*base, "--method", method, *rate)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "EtherControlStableDiffusion3Pipeline" in card
    code, names = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], {}
    exec(code.replace("=control).images", "=control, num_inference_steps=2, height=32, width=32).images"), names)
    assert names["image"].size == (32, 32)
    assert np.abs(generate(names["pipe"]) - generated["trainer"]).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize(
    "more",
    [
        "--method ether_plus --use_ema --proportion_empty_prompts 0.5",
        "--method none --random_flip --control_encoder conv",
        "--method lora --cache_latents --center_crop --offload",
    ],
)
@pytest.mark.parametrize("name", ["klein", "sd3"], indirect=True)
def test_a_resumed_run_ends_with_the_same_file(name, on, train, tmp_path, more):
    flags = [*on(name), "--max_train_steps", 4, "--checkpointing_steps", 2, *more.split()]
    whole, folder = train(*flags, output="whole")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(folder / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    named = [] if "--control_encoder" in flags else ["--control_encoder", "latent"]  # the default, by its name
    again, _ = train(*flags, *named, "--resume_from_checkpoint", "latest", output="resumed")
    assert again.losses == whole.losses and same(folder, tmp_path / "resumed")


@pytest.mark.parametrize(
    "flags",
    [["--cache_latents", "--center_crop"], ["--gradient_checkpointing"], ["--offload"], ["--vae_tiling"]],
    ids=lambda flags: flags[0],
)
@pytest.mark.parametrize("name", FEW_FIRST, indirect=True)
def test_what_saves_memory_changes_nothing_that_is_learned(name, on, train, flags):
    kept = [flag for flag in flags if flag == "--center_crop"]
    usual, changed = train(*on(name), *kept, output="usual")[1], train(*on(name), *flags, output="changed")[1]
    for key, value in tensors(usual).items():
        torch.testing.assert_close(tensors(changed)[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--control_encoder conv",
        "--conditioning_interpolation lanczos",
        "--proportion_empty_prompts 1",
        "--timestep_sampling uniform",
        "--guidance_embedding 3.5",
        "--control_lr 0.01",
        "--random_flip",
    ],
)
def test_the_flag_changes_what_is_learned(on, train, flags):
    usual = train(*on("flux"), output="usual")[1]
    assert not same(train(*on("flux"), *flags.split(), output="changed")[1], usual)


def test_the_columns_have_a_rate_of_their_own_and_start_at_zero(on, train):
    flags = (*on("flux"), "--max_train_steps", 1)
    slow, fast = (
        load_file(train(*flags, "--control_lr", rate, output=str(rate))[1] / WEIGHTS_NAME) for rate in (1e-9, 0.1)
    )
    columns = "control_encoder.projection.weight"
    assert slow[columns].abs().max() < 1e-8 and fast[columns].abs().max() > 0.05
    assert all(torch.equal(tensor, fast[key]) for key, tensor in slow.items() if key != columns)


@pytest.mark.parametrize("name", REQUIRED, indirect=True)
def test_text_encoders_go_before_the_transformer_comes_and_cached_latents_need_no_autoencoder(
    name, on, train, monkeypatch
):
    seen, component = [], FlowFamily.component

    def watch(self, asked):
        found = component(self, asked)
        if self._skeletons:
            seen.append(set(self.modules()))
        return found

    monkeypatch.setattr(FlowFamily, "component", watch)
    train(*on(name), "--num_validation_images", 1, "--num_inference_steps", 2, "--cache_latents", "--center_crop")
    encoders = {each for names in seen for each in names if each.startswith("text_encoder")}
    assert encoders and any("transformer" in names for names in seen)
    assert not any("transformer" in names and names & encoders for names in seen)


@pytest.mark.parametrize("name", ["flux", "klein", "qwen", "sana"], indirect=True)
def test_sample_images_show_control_base_and_controlled(name, on, train):
    flags = ["--num_validation_images", 2, "--num_inference_steps", 2, "--validation_steps", 1]
    _, folder = train(*on(name), *flags)
    assert {path.name for path in folder.rglob("*.png")} == {"control.png", "grid.png", "step-000001.png"}
    first, last = (
        np.asarray(Image.open(path)) for path in (folder / "validation" / "step-000001.png", folder / "grid.png")
    )
    assert first.shape == last.shape and not np.array_equal(first, last)


def test_a_dry_run_tells_what_would_be_trained(on, train, capsys, tmp_path):
    assert train(*on("flux"), "--dry_run")[0] is None
    told = capsys.readouterr().out
    assert "ETHER+ on transformer: " in told and "4 pairs" in told and not (tmp_path / "out").exists()


BAD = [
    ("kontext", "", "FluxKontextPipeline: light control is trained for .*as an editor it takes images itself"),
    ("flux", "--streaming", "--streaming: a FluxPipeline encodes all prompts before the training"),
    ("flux", "--snr_gamma 5", "--snr_gamma: got 5.0, has no meaning for FluxPipeline"),
    ("sd3", "--resolution 18", "--resolution: got 18, needs a multiple of 4"),
    ("sd3", "--control_encoder heavy", "argument --control_encoder: invalid choice: 'heavy'"),
    (
        "sd3",
        "--control_encoder latent --control_type controlnet",
        "--control_encoder: has no effect with --control_type",
    ),
    (None, "--control_encoder latent", "--control_encoder latent: needs a transformer"),
    (None, "--timestep_shift 3", "--timestep_shift: has no effect on StableDiffusionPipeline"),
]


@pytest.mark.parametrize(("base", "flags", "message"), BAD)
def test_a_wrong_flag_is_one_clear_error_and_nothing_is_loaded_or_written(
    base, flags, message, flow_bases, bases, train, monkeypatch, tmp_path, capsys
):
    folder = bases["sd"] if base is None else flow_bases(base)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    size = () if "--resolution" in flags else ("--resolution", 16)
    error = refusal(capsys, train, "--pretrained_model_name_or_path", folder, *size, *flags.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("name", REQUIRED, indirect=True)
def test_frozen_weights_stay_in_half_precision_and_trained_ones_are_float32(name, on, train, monkeypatch, precision):
    seen, finish = [], LoadedRun.finish
    monkeypatch.setattr(LoadedRun, "finish", lambda loaded, *a, **k: (seen.append(loaded), finish(loaded, *a, **k))[1])
    result, _ = train(*on(name), "--mixed_precision", precision, "--num_validation_images", 1)
    assert np.isfinite(result.losses).all()
    models = [seen[0].attached.pipe.transformer, *seen[0].attached.models.values()]
    trained = {each.dtype for model in models for each in model.parameters() if each.requires_grad}
    frozen = {each.dtype for each in seen[0].attached.pipe.transformer.parameters() if not each.requires_grad}
    assert trained == {torch.float32} and torch.bfloat16 in frozen


def test_encoders_of_latents_are_written_and_read_beside_other_methods(on, train):
    _, folder = train(*on("flux"), "--method", "lora")
    encoder = LatentControlEncoder.from_pretrained(folder / "control_encoder")
    assert encoder.projection.weight.abs().max() > 0


@pytest.mark.parametrize("flags", ["--train_text_encoder", "--quantize fp8 --mixed_precision bf16"])
def test_text_encoders_and_quantised_transformers_take_part(on, train, flow_bases, flags):
    _, folder = train(*on("flux"), *flags.split(), "--num_validation_images", 1, "--num_inference_steps", 2)
    pipe = open_control(flow_bases("flux"))
    before = generate(pipe, seed=None)
    pipe.load_ether_weights(folder)
    assert np.abs(generate(pipe) - before).max() > ONE_GREY_LEVEL
    assert ("text_encoder" in pipe.get_list_adapters()) == (flags == "--train_text_encoder")


@pytest.mark.slow
def test_the_script_trains_control_in_two_processes_as_in_one(on, pairs, tmp_path):
    common = [*on("klein"), "--train_data_dir", pairs, "--max_train_steps", 2, "--num_validation_images", 0]
    common += ["--adam_epsilon", "1e-3"]
    one = launch(CONTROLNET, *common, "--train_batch_size", 4, "--output_dir", tmp_path / "one")
    two = launch(CONTROLNET, *common, "--train_batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for key, value in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "two")[key], value, atol=1e-5, rtol=1e-4)
