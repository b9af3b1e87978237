"""`train_dreambooth_ether.py`: what each flag promises happens."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.class_images import PRIOR
from helpers.scripts import STEADY, launch, refusal, same, vectors
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ether_diffusion  # noqa: F401  (gives pipelines their *_ether_* methods)
from ether_diffusion.latents import LatentSpace
from ether_diffusion.training.families import StableDiffusion


@pytest.fixture
def oblong(tmp_path) -> Path:
    """Images that leave room for crops."""
    folder = tmp_path / "oblong"
    folder.mkdir()
    for k, size in enumerate([(60, 20), (20, 50), (44, 22)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{k}.png")
    return folder


# Flags that change what is learned, each against a run without it.


@pytest.mark.parametrize(
    "flags",
    [
        "--snr_gamma 5",
        "--noise_offset 0.5",
        "--repeats 2",
        "--text_encoder_lr 0.001 --train_text_encoder",
        "--lr_scheduler cosine_with_restarts --lr_num_cycles 2",
        "--lr_scheduler polynomial --lr_power 3",
        "--scale_lr",
        "--optimizer prodigy",
        "--use_ema",
        "--use_ema --ema_decay 0.05",
        "--aspect_ratio_buckets 16,32",
        "--cache_latents",
        "--learning_rate 0.01",
        "--train_batch_size 2",
        "--gradient_accumulation_steps 2",
        "--center_crop",
        "--resolution 12",
        "--resolution 24",
        "--random_flip",
        "--max_grad_norm 0.0001",
        "--adam_beta1 0.1",
        "--adam_beta2 0.5",
        "--adam_weight_decay 0.5",
        "--adam_epsilon 0.1",
        "--lr_scheduler linear",
        "--lr_scheduler constant_with_warmup --lr_warmup_steps 3",
        "--max_train_steps 2",
        "--instance_prompt another",
        "--mixed_precision bf16",
        "--method ether",
    ],
)
def test_the_flag_changes_what_is_learned(train, oblong, flags):
    *without, last = re.split(r" (?=--)", flags)
    if last == "--train_text_encoder":
        without, last = [last], without[0]
    base = [word for flag in without for word in flag.split()]
    data = ["--instance_data_dir", oblong]
    usual = train(*data, *base, output="usual")[1]
    assert not same(train(*data, *base, *last.split(), output="changed")[1], usual)


# Flags that change memory or speed, and not what is learned.


@pytest.mark.parametrize(
    "flags",
    [
        "--offload",
        "--offload --train_text_encoder",
        "--pre_compute_text_embeddings",
        "--cache_latents --center_crop",
        "--cache_latents --center_crop --random_flip --pre_compute_text_embeddings --offload",
        "--num_train_epochs 4 --train_batch_size 4",
        "--validation_steps 1 --num_validation_images 1 --num_inference_steps 1",
        "--allow_tf32",
    ],
)
def test_the_flag_changes_nothing_that_is_learned(train, flags):
    speed = {"--offload", "--pre_compute_text_embeddings", "--cache_latents", "--allow_tf32"}
    kept = [word for word in flags.split() if word in ("--center_crop", "--random_flip", "--train_text_encoder")]
    assert any(flag in flags for flag in speed) or "--num_train_epochs" in flags or "--validation_steps" in flags
    assert same(train(*flags.split(), output="changed")[1], train(*kept, output="usual")[1])


def test_cached_latents_are_encoded_once_for_each_view_and_prompts_once(train, oblong, monkeypatch):
    encoded, prompts = [], []
    encode, encode_prompts = LatentSpace.encode, StableDiffusion.encode_prompts

    def count(self, pixels):
        if not self.get_vae().device.type == "meta":  # where the parts of the base are tried together
            encoded.append(1)
        return encode(self, pixels)

    monkeypatch.setattr(LatentSpace, "encode", count)
    monkeypatch.setattr(
        StableDiffusion, "encode_prompts", lambda self, texts: (prompts.extend(texts), encode_prompts(self, texts))[1]
    )
    flags = ["--cache_latents", "--random_flip", "--repeats", 2, "--pre_compute_text_embeddings"]
    train("--instance_data_dir", oblong, *flags, "--max_train_steps", 9)
    assert len(encoded) == 3 * 2 * 2 and prompts == ["a photo of sks toy"]


def test_offloaded_components_come_in_for_their_work_alone(tiny_pipeline):
    family = StableDiffusion(tiny_pipeline)
    family.freeze(torch.device("meta"), offloaded=["vae"])
    assert tiny_pipeline.vae.device.type == "cpu" and tiny_pipeline.unet.device.type == "meta"
    with pytest.raises(RuntimeError, match="fails"), family.on_device("vae", "unet"):
        assert tiny_pipeline.vae.device.type == "meta"
        tiny_pipeline.vae.to_empty(device="meta")
        tiny_pipeline.vae.to = lambda device: setattr(tiny_pipeline, "sent_to", device)
        raise RuntimeError("fails")
    assert tiny_pipeline.sent_to == "cpu"


def test_tf32_is_allowed_where_it_is_asked_for(train):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    train()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    train("--allow_tf32", output="faster")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(train):
    plain = vectors(train(output="plain")[1])
    torch.testing.assert_close(vectors(train("--compile", output="compiled")[1]), plain, rtol=1e-3, atol=1e-4)


# The base model.


def test_a_variant_of_the_base_is_read(train, tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "base", variant="half")
    flags = ["--pretrained_model_name_or_path", tmp_path / "base"]
    assert same(train(*flags, "--variant", "half", output="half")[1], train(output="usual")[1])
    with pytest.raises(SystemExit, match="2"):
        train(*flags)
    assert "cannot be read as a diffusers pipeline" in capsys.readouterr().err


def test_the_module_is_launched_with_flags_in_a_file_and_reads_a_revision_in_the_hubs_cache(
    tiny_pipeline, photographs, tmp_path
):
    cache = tmp_path / "hub" / "models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "better").write_text("abc")
    tiny_pipeline.save_pretrained(cache / "snapshots" / "abc")
    given = {"pretrained_model_name_or_path": "me/tiny", "instance_prompt": "sks toy"}
    given |= {"num_validation_images": 1, "num_inference_steps": 2, "guidance_scale": 1, "max_train_steps": 1}
    (tmp_path / "toy.json").write_text(json.dumps(given))
    flags = [tmp_path / "toy.json", "--revision", "better", "--instance_data_dir", photographs]
    flags += ["--output_dir", tmp_path / "out"]
    done = launch(
        "ether_diffusion.training.dreambooth", *flags, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: me/tiny" in card and "from_pretrained('me/tiny', revision='better')" in card
    assert f"accelerate launch -m ether_diffusion.training.dreambooth {tmp_path}" in card


def test_guidance_reaches_the_images(train):
    flags = ["--num_validation_images", 1, "--num_inference_steps", 3, "--max_train_steps", 1]
    weak, strong = (
        Image.open(train(*flags, "--guidance_scale", scale, output=str(scale))[1] / "grid.png") for scale in (1, 15)
    )
    assert not np.array_equal(np.asarray(weak), np.asarray(strong))


# Steps, rates and epochs.


def test_epochs_are_counted_in_images_and_repeats(train):
    result, _ = train("--num_train_epochs", 3, "--repeats", 4, "--train_batch_size", 2)
    assert len(result.losses) == 3 * 3 * 4 / 2
    assert len(train("--num_train_epochs", 1, "--train_batch_size", 2, output="short")[0].losses) == 2


def test_a_scaled_learning_rate_is_the_one_times_the_samples_of_a_step(train):
    flags = ["--train_batch_size", 2, "--gradient_accumulation_steps", 3]
    scaled = train(*flags, "--scale_lr", "--learning_rate", 0.001, output="scaled")[1]
    assert same(scaled, train(*flags, "--learning_rate", 0.006, output="plain")[1])


def test_text_encoders_have_their_own_rate(train):
    flags = ["--train_text_encoder", "--method", "ether", "--max_train_steps", 1, "--seed", 3]
    slow, fast = (
        load_file(train(*flags, "--text_encoder_lr", rate, output=str(rate))[1] / "pytorch_ether_weights.safetensors")
        for rate in (1e-6, 0.1)
    )
    for name, tensor in slow.items():
        assert torch.equal(tensor, fast[name]) == name.startswith("unet")


@pytest.mark.slow
def test_adamw_in_8_bits_learns_almost_the_same(train):
    pytest.importorskip("bitsandbytes")
    plain, eight = vectors(train(output="plain")[1]), vectors(train("--use_8bit_adam", output="eight")[1])
    torch.testing.assert_close(eight, plain, rtol=0.05, atol=0.02)


# Data.


def test_a_data_set_with_captions_is_trained_like_the_folder_it_came_from(train, photographs, tmp_path):
    folder, prompts = tmp_path / "images", ["one toy", "two toys", "a toy again"]
    folder.mkdir()
    images = []
    for k, (path, prompt) in enumerate(zip(sorted(photographs.iterdir()), prompts, strict=True)):
        image, buffer = Image.open(path), io.BytesIO()
        image.save(folder / f"{k}.png")
        image.save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        (folder / f"{k}.txt").write_text(prompt)
    features = datasets.Features(photo=datasets.Image(), words=datasets.Value("string"))
    (tmp_path / "set").mkdir()
    rows = datasets.Dataset.from_dict({"photo": images, "words": prompts}, features)
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    own = train("--instance_data_dir", folder, output="own")[1]
    flags = ["--dataset_name", tmp_path / "set", "--dataset_config_name", "default", "--image_column", "photo"]
    assert same(own, train(*flags, "--caption_column", "words", output="set")[1])
    assert not same(own, train(*flags, output="uncaptioned")[1])


def test_images_of_two_shapes_train_in_one_batch(train, tmp_path, monkeypatch):
    folder, shapes = tmp_path / "images", []
    folder.mkdir()
    for k, size in enumerate([(40, 20), (20, 40), (40, 22), (30, 30)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{k}.png")
    predict = StableDiffusion.predict
    monkeypatch.setattr(
        StableDiffusion,
        "predict",
        lambda self, noisy, *rest: (shapes.append(noisy.shape), predict(self, noisy, *rest))[1],
    )
    flags = ["--instance_data_dir", folder, "--aspect_ratio_buckets", "16,16;12,24;24,12", "--train_batch_size", 4]
    result, _ = train(*flags, "--max_train_steps", 1)
    assert sorted(map(tuple, shapes)) == [(1, 4, 8, 8), (1, 4, 12, 6), (2, 4, 6, 12)]
    assert np.isfinite(result.losses).all()


# Prior preservation.


@pytest.fixture
def generated(tmp_path, photographs) -> Path:
    """A folder with class images enough."""
    folder = tmp_path / "class"
    folder.mkdir()
    for k in range(3):
        Image.effect_noise((24, 24), 50 + 10 * k).convert("RGB").save(folder / f"{k}.png")
    return folder


def test_the_class_is_trained_beside_the_subject_with_its_weight(train, generated):
    flags = [*PRIOR, "--class_data_dir", generated]
    alone, both = train(*STEADY, output="alone"), train(*STEADY, *flags, output="both")
    unweighted = train(*STEADY, *flags, "--prior_loss_weight", 0, output="unweighted")
    torch.testing.assert_close(vectors(unweighted[1]), vectors(alone[1]), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(vectors(both[1]), vectors(alone[1]), rtol=1e-2)
    assert both[0].losses[0] > 1.5 * alone[0].losses[0]
    assert not same(both[1], train(*STEADY, *flags, "--num_class_images", 3, output="more")[1])
    assert not same(both[1], train(*flags, "--class_prompt", "toys", output="prompt")[1])


def test_missing_class_images_are_generated_and_kept(train, tmp_path):
    folder = tmp_path / "generated"
    flags = [*PRIOR, "--class_data_dir", folder, "--sample_batch_size", 2, "--prior_generation_precision", "fp32"]
    train(*flags, output="first")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["class-00000.png", "class-00001.png"]
    content = [path.read_bytes() for path in sorted(folder.iterdir())]
    assert same(tmp_path / "first", train(*flags, output="second")[1])
    assert content == [path.read_bytes() for path in sorted(folder.iterdir())]


def test_a_run_does_not_go_on_with_other_class_images(train, generated, capsys):
    flags = [*PRIOR, "--class_data_dir", generated, "--resume_from_checkpoint", "latest", "--checkpointing_steps", 2]
    first, _ = train(*flags)
    assert train(*flags)[0].losses == first.losses
    Image.effect_noise((24, 24), 5).convert("RGB").save(generated / "0.png")
    assert re.search("--class_data_dir: was 'sha256:.* and is 'sha256:", refusal(capsys, train, *flags))


# Seeing it learn.


def test_grids_are_generated_after_steps_and_at_the_end(train):
    flags = ["--num_validation_images", 2, "--num_inference_steps", 1, "--validation_prompt", "sks toy", "a toy"]
    _, folder = train(*flags, "--validation_steps", 2, "--max_train_steps", 5, "--report_to", "tensorboard")
    logged = EventAccumulator(str(folder / "logs" / "ether-diffusion")).Reload()
    assert [each.step for each in logged.Images("validation")] == [2, 4, 5]
    figures = {"train/loss", "train/learning_rate", "train/memory", "train/seconds_per_step"}
    assert figures <= set(logged.Tags()["scalars"])
    grids = sorted(path.name for path in (folder / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"] and (folder / "grid.png").exists()
    early, late = (np.asarray(Image.open(folder / "validation" / name)) for name in grids)
    row = early.shape[0] // 4
    assert np.array_equal(early[:row], late[:row]) and not np.array_equal(early[row:], late[row:])


def test_grids_are_generated_after_epochs(train):
    flags = ["--num_validation_images", 1, "--num_inference_steps", 1, "--validation_epochs", 2]
    _, folder = train(*flags, "--max_train_steps", 7, "--train_batch_size", 1)
    assert [path.name for path in (folder / "validation").iterdir()] == ["step-000006.png"]


def test_the_images_of_a_run_with_an_average_show_the_average(train, tiny_pipeline_folder):
    flags = ["--use_ema", "--num_validation_images", 1, "--num_inference_steps", 3, "--validation_prompt", "a dog"]
    _, folder = train(*flags, "--validation_steps", 3, "--max_train_steps", 4, "--method", "ether")
    first = np.asarray(Image.open(folder / "validation" / "step-000003.png"))
    _, whole = train(*flags, "--max_train_steps", 3, "--method", "ether", output="shorter")
    assert np.array_equal(first, np.asarray(Image.open(whole / "grid.png")))


# Methods.


def test_the_rank_shapes_the_factors(train):
    _, folder = train("--method", "lora", "--rank", 3)
    ranks = {min(tensor.shape) for tensor in load_file(folder / "pytorch_lora_weights.safetensors").values()}
    assert ranks == {3}
