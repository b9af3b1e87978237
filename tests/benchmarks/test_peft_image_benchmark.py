"""PEFT's image benchmark on a small random klein: data, a step against the stock pipeline, the whole script."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft_image_benchmark
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.benchmarks import call
from helpers.peft_image import save_inputs
from peft import AdaLoraConfig, FrodConfig
from peft_image_gen.data import Example, read_data_set, read_folder, split
from peft_image_gen.evaluation import drift, similarity
from peft_image_gen.model import open_model, prepare
from peft_image_gen.settings import (
    DATA,
    EXPERIMENTS,
    PROMPTS,
    TEXT_LAYERS,
    Experiment,
    Setting,
    Training,
    read_experiment,
)
from peft_image_gen.training import release, train
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.metrics import load_features
from ether_diffusion.training.families import ModelSource

ROOT = Path(__file__).parents[2]
SMALL = Setting(
    dtype="float32", resolution=32, num_inference_steps=2, repeats=1, drift_prompts=("a photo of cat", "a chair")
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("peft_image"))


def opened(inputs, setting=SMALL):
    return open_model(ModelSource(str(inputs / "model")), setting, "cpu")


def experiment(name, **changes):
    found = read_experiment(f"{name}/flux2-klein-default")
    return type(found)(found.name, found.config, found.training.model_copy(update=changes))


def test_images_are_split_as_in_the_benchmark(inputs):
    examples = [Example(Image.new("RGB", (4, 4)), str(k)) for k in range(20)]
    state = np.random.get_state()
    np.random.seed(0)
    order = np.arange(20)
    np.random.shuffle(order)
    np.random.set_state(state)
    trained, tested = split(examples)
    assert [each.prompt for each in trained] == [str(k) for k in order[:14]]
    assert [each.prompt for each in tested] == [str(k) for k in order[16:]]
    with pytest.raises(InputError, match="got 6 images, needs 7"):
        split(examples[:6])


def test_a_folder_gives_its_captions_or_else_the_benchmarks_prompts(inputs, tmp_path):
    assert tuple(each.prompt for each in read_folder(inputs / "images")) == PROMPTS
    assert tuple(each.prompt for each in read_data_set(str(inputs / "images"))) == PROMPTS
    for k in range(2):
        Image.new("RGB", (6, 4), "red").save(tmp_path / f"{k}.png")
    with pytest.raises(InputError, match="has 2 images without captions; the benchmark's prompts are for 20"):
        read_folder(tmp_path)
    (tmp_path / "0.txt").write_text("a red image")
    with pytest.raises(InputError, match="1.png has no caption, others have one"):
        read_folder(tmp_path)
    (tmp_path / "1.txt").write_text("another one")
    read = read_folder(tmp_path)
    assert [each.prompt for each in read] == ["a red image", "another one"]
    assert read[0].pixels(8).shape == (3, 8, 8)


def test_prompts_are_of_the_layers_that_the_setting_names(inputs):
    stock = DiffusionPipeline.from_pretrained(inputs / "model")
    for layers in TEXT_LAYERS.values():
        family = opened(inputs, Setting(dtype="float32", resolution=32, text_layers=layers))
        (row,) = family.conditioning(["sks cat"])
        with torch.no_grad():
            expected = stock.encode_prompt("sks cat", text_encoder_out_layers=layers)[0][0]
        assert torch.allclose(row["prompt_embeds"], expected, atol=1e-6)


def test_the_loss_of_a_step_is_that_of_the_stock_pipelines_parts(inputs):
    examples = read_folder(inputs / "images")
    trained, tested = split(examples)
    family = opened(inputs)
    prepared = prepare(family, trained, tested)
    found = train(family, prepared, experiment("lora", max_steps=1)).loss  # which begins at the base model

    pipe = DiffusionPipeline.from_pretrained(inputs / "model")
    draws, levels = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(14, generator=draws) for _ in range(1000)])[:2].tolist()
    pixels = torch.stack([trained[k].pixels(32) for k in order])
    with torch.no_grad():
        latents = pipe._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode())
        mean, variance = (each.view(1, -1, 1, 1) for each in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
        latents = (latents - mean) / torch.sqrt(variance + pipe.vae.config.batch_norm_eps)
        noise = torch.randn(latents.shape, generator=draws)
        indices = (torch.rand(2, generator=levels) * 1000).long()
        timesteps, sigmas = pipe.scheduler.timesteps[indices], pipe.scheduler.sigmas[indices].view(-1, 1, 1, 1)
        embeds, text_ids = pipe.encode_prompt(
            [trained[k].prompt for k in order], text_encoder_out_layers=TEXT_LAYERS["benchmark"]
        )
        ids = pipe._prepare_latent_ids(latents)
        answer = pipe.transformer(
            hidden_states=pipe._pack_latents((1 - sigmas) * latents + sigmas * noise),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        expected = (pipe._unpack_latents_with_ids(answer, ids) - (noise - latents)).square().mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_every_experiment_starts_from_the_same_model_and_draws(inputs):
    trained, tested = split(read_folder(inputs / "images"))
    family = opened(inputs)
    prepared = prepare(family, trained, tested)
    losses = [train(family, prepared, experiment(name, max_steps=2)).loss for name in ("ether", "lora", "ether")]
    assert losses[0] == losses[2] != losses[1]
    with pytest.raises(InputError, match="max_steps is 7001, the images are enough for 7000"):
        train(family, prepared, experiment("ether", max_steps=7001))


def test_methods_that_move_their_ranks_or_keep_sparse_tensors_are_trained_as_well(inputs):
    trained, tested = split(read_folder(inputs / "images"))
    family = opened(inputs)
    prepared = prepare(family, trained, tested)
    start, ranks = {"tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 3}, {"init_r": 4, "target_r": 1}
    adalora = AdaLoraConfig(target_modules=["to_q", "to_k"], **start, **ranks)
    model = train(family, prepared, Experiment("adalora/small", adalora, Training(max_steps=3))).model
    assert min(sum(kept) for kept in model.peft_config["default"].rank_pattern.values()) < 4
    frod = FrodConfig(target_modules=["to_q", "to_k"])
    trained = train(family, prepared, Experiment("frod/small", frod, Training(max_steps=1)))
    assert trained.parameters > 0 and trained.peak_bytes > 0


def test_drift_is_nothing_before_training_and_something_after(inputs):
    trained, tested = split(read_folder(inputs / "images"))
    family, features = opened(inputs), load_features(str(inputs / "dinov2"))
    prepared = prepare(family, trained, tested)
    still = {"max_steps": 1, "optimizer_kwargs": {"lr": 1e-30, "weight_decay": 0.0}}
    model = train(family, prepared, experiment("lora", **still)).model.eval()
    assert drift(family, model, features) == pytest.approx(0, abs=1e-6)
    moved = {"max_steps": 5, "optimizer_kwargs": {"lr": 0.3, "weight_decay": 0.0}}
    model = train(family, prepared, experiment("lora", **moved)).model.eval()
    assert 1e-5 < drift(family, model, features) <= 1
    alike, images = similarity(family, tested, features)
    assert -1 <= alike < 1 and len(images) == 4
    cosines = [
        (features.embed_images([one]) * features.embed_images([each.image])).sum().item()
        for one, each in zip(images, tested, strict=True)
    ]
    assert alike == pytest.approx(sum(cosines) / 4, abs=1e-6)
    release(family)
    assert "transformer" not in family.modules()


def flags(inputs, output, *more):
    places = ("--model", inputs / "model", "--data_dir", inputs / "images", "--dinov2", inputs / "dinov2")
    return [str(each) for each in ("--output_dir", output, *places, "--quick", *more)]


def run(monkeypatch, inputs, output, *more):
    """In this process; of a flag that is given twice, the last counts."""
    monkeypatch.setattr("sys.argv", ["peft_image_benchmark.py", *flags(inputs, output, *more)])
    peft_image_benchmark.main()


def refused(monkeypatch, inputs, output, *more):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, inputs, output, *more)
    return str(stop.value)


def test_the_script_fills_a_row_for_each_experiment_and_goes_on_where_it_stopped(
    inputs, tmp_path, monkeypatch, capsys
):
    out, names = tmp_path / "out", [f"{name}/flux2-klein-default" for name in ("ether", "lora")]
    call("peft_image_benchmark.py", *flags(inputs, out, "--experiments", names[0]))
    first = json.loads((out / "peft_image_gen.json").read_text())
    run(monkeypatch, inputs, out, "--experiments", *names)
    printed = capsys.readouterr().out
    report = json.loads((out / "peft_image_gen.json").read_text())
    assert report["rows"][0] == first["rows"][0]  # and not measured again
    assert [row["experiment"] for row in report["rows"]] == names and all(name in printed for name in names)
    assert "LoRA r64" not in printed  # published rows stand beside those of the same setting alone
    for row in report["rows"]:
        assert row["parameters"] > 0 and row["peak_bytes"] > 4 * row["parameters"]
        assert -1 <= row["similarity"] <= 1 and -1e-6 < row["drift"] <= 1
        assert 0 < row["step_seconds"] < row["seconds"]
        assert row["file_bytes"] == (out / "adapters" / row["experiment"] / "adapter_model.safetensors").stat().st_size
        assert (out / "images" / f"{row['experiment'].replace('/', '--')}.png").is_file()
    assert report["text_layers"] == [10, 20, 30] and str(inputs) not in json.dumps(report)
    assert "holds rows of text_layers" in refused(monkeypatch, inputs, out, "--text_layers", "pipeline")
    own = tmp_path / "ether" / "flux2-klein-default"
    shutil.copytree(EXPERIMENTS / names[0], own)
    (own / "training_params.json").unlink()
    told = refused(monkeypatch, inputs, out, "--experiments", own)
    assert "holds a row of ether/flux2-klein-default with other parameters" in told


def test_what_cannot_be_run_is_refused_in_one_sentence(inputs, monkeypatch, tmp_path, tiny_pipeline_folder):
    out = tmp_path / "out"
    told = refused(monkeypatch, inputs, out, "--model", tiny_pipeline_folder)
    assert told.endswith("is a StableDiffusionPipeline, the benchmark is of a Flux2KleinPipeline")
    told = refused(monkeypatch, inputs, out, "--dinov2", tmp_path / "none")
    assert told.startswith(f"error: --dinov2 {tmp_path / 'none'}: cannot be loaded")
    twice = ["ether/flux2-klein-default"] * 2
    assert "is there twice" in refused(monkeypatch, inputs, out, "--experiments", *twice)
    assert not out.exists()
    setting = Setting(resolution=32, text_layers=(10, 20, 40))
    with pytest.raises(InputError, match="its text encoder has 30 layers, the text is to be that of 40"):
        opened(inputs, setting)
    with pytest.raises(InputError, match="--resolution: got 30, needs a multiple of 4"):
        opened(inputs, Setting(resolution=30))


def test_published_rows_stand_beside_those_of_the_same_setting_alone():
    settings = {"model": "FLUX.2-klein-base-4B", "data": DATA, "dinov2": "dinov2-base", "max_train_steps": None}
    assert peft_image_benchmark.is_published(settings, Setting())
    assert not peft_image_benchmark.is_published(settings | {"model": "FLUX.2-klein-base-9B"}, Setting())
    assert not peft_image_benchmark.is_published(settings | {"data": "photos"}, Setting())
    assert not peft_image_benchmark.is_published(settings | {"max_train_steps": 10}, Setting())
    assert not peft_image_benchmark.is_published(settings, Setting(text_layers=TEXT_LAYERS["pipeline"]))


def test_the_rows_in_small_have_every_column_and_say_that_they_mean_nothing():
    report = json.loads((ROOT / "benchmarks" / "results" / "peft_image_gen_small.json").read_text("utf-8"))
    assert report["label"].startswith("random weights")
    methods = ("ether", "ether_plus", "ether_plus_one_sided", "lora", "oft")
    assert [row["experiment"] for row in report["rows"]] == [f"{name}/flux2-klein-default" for name in methods]
    columns = ("parameters", "file_bytes", "similarity", "drift", "peak_bytes", "step_seconds", "seconds", "loss")
    assert all(row[name] > 0 for row in report["rows"] for name in columns)


def test_the_page_has_every_published_row():
    page = (ROOT / "docs" / "peft-image-benchmark.md").read_text("utf-8")
    found = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| [^|]* \| (0\.\d{3}) \|", page, re.MULTILINE)
    rows = json.loads(peft_image_benchmark.PUBLISHED.read_text("utf-8"))["rows"]
    assert found == [(row["title"], f"{row['parameters']:,}", f"{row['similarity']:.3f}") for row in rows]
