"""`train_controlnet_ether.py` from end to end, as a user calls it."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from helpers.control_data import label_map, write
from helpers.scripts import CONTROLNET, in_process, launch, refusal, same, tensors
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ether_diffusion import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.training import control
from ether_diffusion.training.options import CONTROL_STEPS, ControlValidationOptions, parse_options
from ether_diffusion.training.run import LoadedRun

STEP = 1 / 255


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture
def train(pairs, bases, tmp_path):
    """The script's own main, in this process: train(*flags, base=…, output=…) -> (result, output folder)."""
    usual = {"--train_data_dir": pairs, "--max_train_steps": 3, "--num_validation_images": 0}
    call = in_process(control.main, {**usual, "--learning_rate": 0.05, "--control_lr": 0.05}, tmp_path)
    return lambda *flags, base="sd", **more: call("--pretrained_model_name_or_path", bases[base], *flags, **more)


@pytest.fixture
def generated(monkeypatch) -> dict[str, np.ndarray]:
    """What the trainer's own pipeline generates at the end of a run, under "trainer"."""
    seen, finish = {}, LoadedRun.finish

    def generate_and_finish(loaded, *args, **kwargs):
        seen["trainer"] = generate(loaded.attached.pipe)
        return finish(loaded, *args, **kwargs)

    monkeypatch.setattr(LoadedRun, "finish", generate_and_finish)
    return seen


def generate(pipe, control: Image.Image | None = None, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    control = label_map(16, 16, 3) if control is None else control
    options = {"image" if hasattr(pipe, "controlnet") else "control_image": control, **options}
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16}
    return pipe("a dog", num_inference_steps=3, generator=generator, output_type="np", **size, **options).images[0]


def test_the_command_of_the_readme_trains_saves_generates_and_describes(pairs, bases, tmp_path):
    folder = tmp_path / "maps"
    flags = ["--pretrained_model_name_or_path", bases["sd"], "--train_data_dir", pairs, "--output_dir", folder]
    flags += ["--max_train_steps", 4, "--train_batch_size", 2, "--gradient_checkpointing", "--train_text_encoder"]
    flags += ["--validation_image", pairs / "maps" / "0.png", pairs / "maps" / "1.png", "--validation_prompt", "a dog"]
    flags += ["--num_validation_images", 2, "--num_inference_steps", 2, "--validation_steps", 2]
    done = launch(CONTROLNET, *flags, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert {"README.md", "control.png", "grid.png", "validation", WEIGHTS_NAME} == {
        path.name for path in folder.iterdir()
    }
    assert [path.name for path in (folder / "validation").iterdir()] == ["step-000002.png"]
    grid = Image.open(folder / "grid.png")
    assert grid.height > 6 * 128 and grid.width > 2 * 128
    card = (folder / "README.md").read_text()
    assert "EtherControlPipeline" in card and "4 pairs" in card and "controlnet" in card
    assert {name.partition(".")[0] for name in load_file(folder / WEIGHTS_NAME)} == {
        "control_encoder", "unet", "text_encoder",
    }  # fmt: skip


@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["none", "ether", "ether_plus"])
def test_one_file_carries_light_control_and_generates_what_the_trainer_generated(
    train, generated, bases, base, method
):
    text = [] if method == "none" else ["--train_text_encoder"]
    _, folder = train("--method", method, *text, base=base)
    kind = {"sd": EtherControlPipeline, "sdxl": EtherControlXLPipeline}[base]
    pipe = kind.from_pretrained(bases[base])
    pipe.load_ether_weights(folder)
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= STEP
    other = generate(pipe, label_map(16, 16, 8))
    assert np.abs(other - generated["trainer"]).max() > STEP


@pytest.mark.parametrize("method", ["lora", "oft", "full"])
def test_peers_of_ether_are_saved_beside_the_encoder(train, generated, bases, method):
    _, folder = train("--method", method, "--learning_rate", 0.01)
    base = folder if method == "full" else bases["sd"]
    stock = DiffusionPipeline.from_pretrained(base)
    if method == "lora":
        stock.load_lora_weights(folder)
    if method == "oft":
        stock.unet = PeftModel.from_pretrained(stock.unet, folder / "unet").base_model.model
    pipe = EtherControlPipeline.from_pipe(stock)
    pipe.add_control("control", ControlEncoder.from_pretrained(folder / "control_encoder"))
    assert np.abs(generate(pipe) - generated["trainer"]).max() <= STEP


@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["none", "ether", "ether_plus", "full"])
def test_a_merged_controlnet_generates_in_a_stock_pipeline_what_the_trainer_generated(
    train, generated, bases, base, method
):
    rate = [] if method == "none" else ["--learning_rate", 0.01]
    _, folder = train("--control_type", "controlnet", "--method", method, *rate, base=base)
    kind = {"sd": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}[base]
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    assert not any("ether" in name for name, _ in controlnet.named_parameters())
    merged = kind.from_pretrained(bases[base], controlnet=controlnet)
    assert np.abs(generate(merged) - generated["trainer"]).max() <= STEP
    assert np.abs(generate(merged, label_map(16, 16, 8)) - generated["trainer"]).max() > STEP
    if method in ("ether", "ether_plus"):
        widths = controlnet.config.conditioning_embedding_out_channels
        copy = ControlNetModel.from_unet(merged.unet, conditioning_embedding_out_channels=widths)
        own = kind.from_pretrained(bases[base], controlnet=copy)
        before = {name: tensor.clone() for name, tensor in own.controlnet.state_dict().items()}
        own.load_ether_weights(folder)
        assert np.abs(generate(own) - generated["trainer"]).max() <= STEP
        own.unload_ether_weights()
        after = own.controlnet.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.slow
def test_the_merged_controlnet_generates_the_same_in_a_new_process(train, generated, bases, tmp_path):
    _, folder = train("--control_type", "controlnet")
    label_map(16, 16, 3).save(tmp_path / "map.png")
    script = f"""
import numpy as np, torch
from PIL import Image
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
controlnet = ControlNetModel.from_pretrained({str(folder / "controlnet")!r})
pipe = StableDiffusionControlNetPipeline.from_pretrained({str(bases["sd"])!r}, controlnet=controlnet)
generator = torch.Generator().manual_seed(0)
image = pipe("a dog", image=Image.open({str(tmp_path / "map.png")!r}), num_inference_steps=3, generator=generator,
               output_type="np", height=16, width=16).images[0]
np.save({str(tmp_path / "image.npy")!r}, image)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert np.abs(np.load(tmp_path / "image.npy") - generated["trainer"]).max() <= STEP


@pytest.mark.parametrize(("precision", "control_type"), [("bf16", "light"), ("bf16", "controlnet"), ("fp16", "light")])
@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_grids_are_generated_in_half_precision(train, base, precision, control_type):
    flags = ["--mixed_precision", precision, "--control_type", control_type, "--learning_rate", 0.01]
    flags += ["--num_validation_images", 1, "--num_inference_steps", 2, "--validation_steps", 2]
    result, folder = train(*flags, base=base)
    assert np.isfinite(result.losses).all()
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert (folder / "validation" / "step-000002.png").exists() and grid.std() > 10


@pytest.mark.parametrize("control_type", ["light", "controlnet"])
def test_frozen_weights_stay_in_half_precision_and_trained_ones_are_float32(train, monkeypatch, control_type):
    seen, finish = [], LoadedRun.finish
    monkeypatch.setattr(LoadedRun, "finish", lambda loaded, *a, **k: (seen.append(loaded), finish(loaded, *a, **k))[1])
    train("--mixed_precision", "bf16", "--control_type", control_type)
    pipe = seen[0].attached.pipe
    models = [pipe.unet, pipe.vae, pipe.text_encoder, *seen[0].attached.models.values()]
    dtypes = {(each.requires_grad, each.dtype) for model in models for each in model.parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}


CARDS = ["--method ether", "--method none", "--method lora", "--method oft", "--method full"]


@pytest.mark.parametrize("flags", [*CARDS, "--control_type controlnet"])
def test_the_code_on_the_card_generates_under_control(train, bases, tmp_path, monkeypatch, flags):
    shutil.copytree(bases["sd"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train("--pretrained_model_name_or_path", tmp_path / "base", *flags.split())
    code = re.search(r"```python\n(.*?)\n```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code.replace("=control).images", "=control, num_inference_steps=1).images"), names)
    assert names["image"].size == (16, 16)


def test_every_learning_rate_is_logged_under_its_name_and_stands_on_the_card(train):
    flags = ["--train_text_encoder", "--text_encoder_lr", 0.02, "--report_to", "tensorboard"]
    _, folder = train(*flags)
    logged = EventAccumulator(str(folder / "logs" / "ether-diffusion")).Reload()
    rates = {"learning_rate": 0.05, "text_encoder_learning_rate": 0.02, "control_learning_rate": 0.05}
    for name, rate in rates.items():
        assert logged.Scalars(f"train/{name}")[0].value == pytest.approx(rate)
    assert "denoiser 0.05, text encoder 0.02, control 0.05" in (folder / "README.md").read_text()


def test_a_scaled_learning_rate_of_the_control_is_among_the_logged_options(train):
    flags = ["--scale_lr", "--control_lr", 0.01, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    _, folder = train(*flags, "--report_to", "tensorboard", "--checkpointing_steps", 3)
    (written,) = (folder / "logs").rglob("hparams.yml")
    logged = yaml.safe_load(written.read_text())
    assert logged["control_lr"] == pytest.approx(0.04) and logged["learning_rate"] == pytest.approx(0.2)
    assert json.loads((folder / "checkpoint-3" / "checkpoint.json").read_text())["run"]["control_lr"] == 0.04
    assert "denoiser 0.2, control 0.04" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        "--method none",
        "--method ether_plus --train_text_encoder",
        "--method lora",
        "--method none --control_type controlnet",
        "--method ether --control_type controlnet",
    ],
)
def test_as_many_parameters_are_saved_as_the_card_says(train, flags):
    _, folder = train(*flags.split())
    # What lies in controlnet/ is whole: copied weights, with what was learned in them.
    saved = {name: tensor for name, tensor in tensors(folder).items() if not name.startswith("controlnet/")}
    count = sum(tensor.numel() for tensor in saved.values())
    assert f"| trained parameters | {count:,} |" in (folder / "README.md").read_text()


def test_gradients_are_clipped_over_encoder_and_reflections_together(train):
    flags = ["--method", "ether", "--max_train_steps", 1]
    clipped, still = (
        load_file(train(*flags, *more, output=more[0])[1] / WEIGHTS_NAME)
        for more in (["--max_grad_norm", 1e-12], ["--learning_rate", 1e-9, "--control_lr", 1e-9])
    )
    usual = load_file(train(*flags)[1] / WEIGHTS_NAME)
    for part in ("control_encoder", "unet"):
        names = [name for name in still if name.startswith(part)]
        assert all(torch.allclose(clipped[name], still[name], atol=1e-4) for name in names), part
        assert not all(torch.allclose(usual[name], still[name], atol=1e-2) for name in names), part


@pytest.mark.parametrize(("interpolation", "told"), [("nearest", True), ("lanczos", False)])
def test_the_card_of_a_controlnet_says_that_stock_pipelines_smooth_label_maps(train, interpolation, told):
    _, folder = train("--control_type", "controlnet", "--conditioning_interpolation", interpolation)
    assert ("at the size of the result" in (folder / "README.md").read_text()) == told


def test_a_controlnet_to_start_from_is_taken(train, bases):
    first = train("--control_type", "controlnet", output="first")[1]
    flags = ["--control_type", "controlnet", "--controlnet_model_name_or_path", first / "controlnet"]
    flags += ["--learning_rate", 1e-9, "--control_lr", 1e-9]
    start, again = (load_file(f / "controlnet" / "diffusion_pytorch_model.safetensors") for f in (
        first, train(*flags, output="again")[1],
    ))  # fmt: skip
    assert all(torch.allclose(again[name], start[name], atol=1e-5) for name in start)


@pytest.mark.parametrize(
    "more",
    [
        "--control_type light --method ether_plus --train_text_encoder --use_ema",
        "--control_type light --method none --random_flip",
        "--control_type light --method lora --cache_latents --center_crop --pre_compute_text_embeddings --offload",
        "--control_type light --streaming --proportion_empty_prompts 0.5",
        "--control_type controlnet --method ether --lr_scheduler cosine --gradient_checkpointing",
        "--control_type controlnet --method full --mixed_precision bf16 --snr_gamma 5 --noise_offset 0.1",
    ],
)
def test_a_resumed_run_ends_with_the_same_file(train, tmp_path, more):
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, *more.split()]
    whole, folder = train(*flags, output="whole")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(folder / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    again, _ = train(*flags, "--resume_from_checkpoint", "latest", output="resumed")
    assert again.losses == whole.losses and same(folder, tmp_path / "resumed")


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "controlnet_model_name_or_path"])
def test_a_run_does_not_go_on_from_a_model_that_was_replaced(train, bases, tmp_path, capsys, flag):
    model = tmp_path / "model"
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, f"--{flag}", model]
    if flag.startswith("controlnet"):
        flags += ["--control_type", "controlnet"]
        shutil.copytree(train("--control_type", "controlnet", output="first")[1] / "controlnet", model)
    else:
        shutil.copytree(bases["sd"], model)
    shutil.copytree(train(*flags, output="whole")[1] / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    weights = next(path for path in model.rglob("diffusion_pytorch_model.safetensors") if path.parent.name != "vae")
    tampered = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tampered, weights, metadata={"format": "pt"})
    error = refusal(capsys, partial(train, output="resumed"), *flags, "--resume_from_checkpoint", "latest")
    assert re.search(rf"--{flag}: was '.*model \(sha256:\w+\)' in .*checkpoint-2 and is '.*\(sha256:", error), error


@pytest.mark.slow
@pytest.mark.parametrize("control_type", ["light", "controlnet"])
def test_two_processes_learn_what_one_learns(pairs, bases, tmp_path, control_type):
    for processes, batch in ((1, 4), (2, 2)):
        flags = ["--pretrained_model_name_or_path", bases["sd"], "--train_data_dir", pairs, "--max_train_steps", 3]
        flags += ["--num_validation_images", 0, "--control_type", control_type, "--train_batch_size", batch]
        flags += ["--output_dir", tmp_path / str(processes)]
        done = launch(CONTROLNET, *flags, processes=processes, HF_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert f"{processes} process" in done.stderr
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    assert one.keys() == two.keys() and len(one) > 3
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


# Flags.


@pytest.mark.parametrize(
    "flags",
    [
        "--control_lr 0.001",
        "--conditioning_interpolation lanczos",
        "--max_train_samples 2",
        "--proportion_empty_prompts 1",
        "--streaming",
        "--random_flip",
        "--noise_offset 0.5",
        "--scale_lr",
        "--optimizer prodigy --control_lr 0.001 --learning_rate 1",
    ],
)
def test_the_flag_changes_what_is_learned(train, flags):
    assert not same(train(*flags.split(), output="changed")[1], train(output="usual")[1])


def test_the_control_has_a_rate_of_its_own(train):
    flags = ["--max_train_steps", 1, "--method", "ether"]
    slow, fast = (
        load_file(train(*flags, "--control_lr", rate, output=str(rate))[1] / WEIGHTS_NAME) for rate in (1e-4, 0.1)
    )
    for name, tensor in slow.items():
        if name.startswith("unet") or name.endswith(("conv_out.weight", "conv_out.bias")):
            assert torch.equal(tensor, fast[name]) == name.startswith("unet"), name


def test_a_data_set_with_other_columns_is_trained_like_the_folder_it_came_from(train, pairs, tmp_path):
    rows = datasets.load_dataset(str(pairs), split="train")
    rows = rows.map(lambda row: {"conditioning_image": str(pairs / row["conditioning_image"])})
    rows = rows.cast_column("conditioning_image", datasets.Image())
    rows = rows.rename_columns({"image": "photo", "conditioning_image": "map", "text": "words"})
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "set", "--dataset_config_name", "default", "--image_column", "photo"]
    flags += ["--conditioning_image_column", "map", "--caption_column", "words"]
    assert same(train(*flags, output="set")[1], train(output="folder")[1])


def test_without_a_number_of_steps_training_goes_on_until_control_is_learned(pairs):
    def steps(*flags: str) -> int:
        words = ["--train_data_dir", str(pairs), *flags]
        given = parse_options(control.Options, words).optimization
        return given.resolve(default_learning_rate=1e-3, epoch_samples=40, processes=1).steps

    assert (steps(), steps("--max_train_steps", "7"), steps("--num_train_epochs", "3")) == (CONTROL_STEPS, 7, 30)


def test_control_images_and_prompts_of_the_validation_are_paired():
    def pairs_of(images: str, prompts: str) -> list[tuple[str, str]]:
        return ControlValidationOptions(validation_image=tuple(images), validation_prompt=tuple(prompts)).pairs

    assert pairs_of("ab", "xy") == [("a", "x"), ("b", "y")]
    assert pairs_of("ab", "x") == [("a", "x"), ("b", "x")]
    assert pairs_of("a", "xy") == [("a", "x"), ("a", "y")]
    assert ControlValidationOptions().pairs == []


BAD = [
    ("--control_type heavy", "argument --control_type: invalid choice: 'heavy'"),
    ("--method dora", "argument --method: invalid choice: 'dora'"),
    ("--method none --target_modules to_q", "--target_modules: has no effect with --method none"),
    ("--method none --train_text_encoder", "--train_text_encoder: has no effect with --method none"),
    ("--control_type controlnet --train_text_encoder", "--train_text_encoder: has no effect with --control_type"),
    ("--controlnet_model_name_or_path x", "has no effect without --control_type controlnet"),
    ("--method none --learning_rate 0.1", "--learning_rate: has no effect with --method none; use --control_lr"),
    ("--control_lr 0", "--control_lr: got 0.0, needs a finite number above 0"),
    ("--optimizer prodigy", "--control_lr: got 0.05, --optimizer prodigy takes one learning rate"),
    ("--proportion_empty_prompts 1.5", "--proportion_empty_prompts: got 1.5, needs a number from 0 to 1"),
    ("--max_train_samples 0", "--max_train_samples: got 0, needs a whole number from 1"),
    ("--train_data_dir {new}", "new: there is no such folder"),
    ("--train_data_dir {pairs} --dataset_name {pairs}", "got both, needs one of the two"),
    ("--image_column photo", "--image_column photo: .* has the columns image, conditioning_image, text"),
    ("--conditioning_image_column map", "--conditioning_image_column map: .* has the columns image, cond"),
    ("--caption_column words", "--caption_column words: .* has the columns image, conditioning_image, text"),
    ("--streaming --cache_latents", "--cache_latents: cannot go with --streaming"),
    ("--streaming --pre_compute_text_embeddings", "--pre_compute_text_embeddings: cannot go with --streaming"),
    ("--streaming --num_train_epochs 1", "--streaming: has no epochs"),
    ("--validation_prompt dog", "--validation_prompt: has no effect without --validation_image; add it"),
    ("--validation_image {map}", "--validation_image: needs a --validation_prompt for each image"),
    ("--validation_image {map} {map} {map} --validation_prompt a b", "got 3 images for 2 prompts"),
    ("--validation_image {new} --validation_prompt a", "new: there is no such file"),
    (
        "--control_type controlnet --mixed_precision fp16",
        "--mixed_precision fp16: --control_type controlnet needs a GPU",
    ),
    ("--resume_from_checkpoint checkpoint-3", "checkpoint-3: there is no such folder"),
    ("--with_prior_preservation", "unrecognized arguments: --with_prior_preservation"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_a_wrong_flag_is_one_clear_error_and_nothing_is_loaded_or_written(
    train, pairs, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    places = {"new": tmp_path / "new", "pairs": pairs, "map": pairs / "maps" / "0.png"}
    error = refusal(capsys, train, *flags.format(**places).split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_controlnet_that_cannot_be_had_or_does_not_fit_is_told_before_weights_are_read(
    train, pairs, bases, tmp_path, monkeypatch, capsys
):
    other = ControlNetModel.from_unet(DiffusionPipeline.from_pretrained(bases["sdxl"]).unet)
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    for folder, message in ((pairs, "cannot be read as a ControlNet"), (tmp_path / "other", "needs that of the UNet")):
        flags = ["--control_type", "controlnet", "--controlnet_model_name_or_path", folder]
        assert message in refusal(capsys, train, *flags)
