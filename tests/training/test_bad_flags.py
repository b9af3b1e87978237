"""A wrong flag: one clear error and exit code 2, before a model is loaded and with nothing written."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from helpers.scripts import refusal
from PIL import Image

from ether_diffusion.training import dreambooth

PRIOR = "--with_prior_preservation --class_data_dir {new} --class_prompt toys"

CASES = [
    # unknown, missing, of the wrong type
    ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
    ("--lr 1", "unrecognized arguments: --lr 1"),
    ("--meth ether", "unrecognized arguments: --meth ether"),
    ("--max_train_steps many", "argument --max_train_steps: invalid int value: 'many'"),
    ("--learning_rate", "argument --learning_rate: expected one argument"),
    ("--method dora", "argument --method: invalid choice: 'dora'"),
    ("--instance_prompt ''", "--instance_prompt: got '', needs a text that is not blank"),
    # out of range
    ("--max_train_steps 0", "--max_train_steps: got 0, needs a whole number from 1"),
    ("--train_batch_size -1", "--train_batch_size: got -1, needs a whole number from 1"),
    ("--num_blocks 0", "--num_blocks: got 0, needs a whole number from 1"),
    ("--learning_rate -1", "--learning_rate: got -1.0, needs a finite number above 0"),
    ("--learning_rate nan", "--learning_rate: got nan, needs a finite number above 0"),
    ("--learning_rate 0", "--learning_rate: got 0.0, needs a finite number above 0"),
    ("--adam_beta1 1", "--adam_beta1: got 1.0, needs a number from 0 and below 1"),
    ("--adam_beta2 1", "--adam_beta2: got 1.0, needs a number from 0 and below 1"),
    ("--ema_decay 1 --use_ema", "--ema_decay: got 1.0, needs a number from 0 and below 1"),
    ("--max_grad_norm inf", "--max_grad_norm: got inf, needs a finite number above 0"),
    ("--snr_gamma 0", "--snr_gamma: got 0.0, needs a finite number above 0"),
    ("--noise_offset -1", "--noise_offset: got -1.0, needs a finite number from 0"),
    ("--repeats 0", "--repeats: got 0, needs a whole number from 1"),
    ("--seed -1", "--seed: got -1, needs a whole number from 0"),
    ("--lr_power 0 --lr_scheduler polynomial", "--lr_power: got 0.0, needs a finite number above 0"),
    # without effect, or against each other
    ("--ema_decay 0.9", "--ema_decay: has no effect without --use_ema; add it"),
    ("--text_encoder_lr 1e-3", "--text_encoder_lr: has no effect without --train_text_encoder; add it"),
    ("--text_encoder_target_modules q_proj", "has no effect without --train_text_encoder; add it"),
    ("--class_prompt toys", "--class_prompt: has no effect without --with_prior_preservation; add it"),
    ("--num_class_images 5", "--num_class_images: has no effect without --with_prior_preservation; add it"),
    ("--hub_model_id me/it", "--hub_model_id: has no effect without --push_to_hub; add it"),
    ("--image_column photo", "--image_column: has no effect without --dataset_name; add it"),
    ("--lr_warmup_steps 5", "--lr_warmup_steps: got 5, has no effect with --lr_scheduler constant"),
    ("--lr_num_cycles 2", "--lr_num_cycles: has no effect without --lr_scheduler cosine_with_restarts"),
    ("--lr_power 2", "--lr_power: has no effect without --lr_scheduler polynomial"),
    ("--resolution 16 --aspect_ratio_buckets 16,16", "--resolution: has no effect with --aspect_ratio_buckets"),
    ("--max_train_steps 2 --num_train_epochs 2", "--num_train_epochs: has no effect with --max_train_steps"),
    (
        "--validation_steps 1 --validation_epochs 1 --num_validation_images 1",
        "--validation_epochs: has no effect with",
    ),
    ("--validation_steps 1 --num_validation_images 0", "--validation_steps: has no effect with --num_validation"),
    ("--rank 4", "--rank: got 4, has no effect with --method ether_plus, only with lora, hra, vera"),
    ("--method lora --num_blocks 2", "--num_blocks: got 2, has no effect with --method lora"),
    ("--method full --target_modules to_q", "--target_modules: has no effect with --method full"),
    ("--method lora --adapter_config {lora}", "--method: has no effect with --adapter_config; drop one"),
    ("--use_8bit_adam --optimizer prodigy", "--use_8bit_adam: has no effect with --optimizer prodigy; drop one"),
    ("--pre_compute_text_embeddings --train_text_encoder", "contradicts --train_text_encoder"),
    ("--optimizer prodigy --train_text_encoder --text_encoder_lr 2", "--optimizer prodigy takes one learning rate"),
    ("--attention_backend sdpa --enable_xformers_memory_efficient_attention", "contradicts"),
    ("--instance_data_dir {photos} --dataset_name {photos}", "got both, needs one of the two"),
    # prior preservation
    ("--with_prior_preservation --class_prompt toys", "--class_data_dir: is missing; --with_prior_preservation needs"),
    (
        "--with_prior_preservation --class_data_dir {new}",
        "--class_prompt: is missing; --with_prior_preservation needs",
    ),
    ("--with_prior_preservation --class_prompt toys --class_data_dir {note}", "is a file, needs a folder"),
    ("--with_prior_preservation --class_prompt toys --class_data_dir {photos}", "the same folder as --instance_data"),
    (f"{PRIOR} --num_class_images 0", "--num_class_images: got 0, needs a whole number from 1"),
    # files and folders
    ("--instance_data_dir {new}", "new: there is no such folder"),
    ("--instance_data_dir {note}", "is a file, not a folder"),
    ("--instance_data_dir {empty}", "holds 0 files but no image"),
    ("--instance_data_dir {damaged}", "torn.png: the image is truncated or damaged"),
    ("--instance_data_dir {texts}", "text.png: is not an image"),
    ("--caption_column words", "--caption_column words: there is no metadata.jsonl in"),
    ("--dataset_name {new}", "new: cannot be loaded"),
    ("--pretrained_model_name_or_path {new}", "new: there is no such folder"),
    ("--pretrained_model_name_or_path {photos}", "cannot be read as a diffusers pipeline"),
    ("--output_dir {note}/out", "out: cannot be written to"),
    ("--output_dir /proc/out", "--output_dir /proc/out: cannot be written to"),
    ("--mixed_precision fp8", "argument --mixed_precision: invalid choice: 'fp8'"),
    ("--resume_from_checkpoint checkpoint-7", "checkpoint-7: there is no such folder"),
    ("--adapter_config {new}", "--adapter_config .*new: "),
    ("--adapter_config {note}", "--adapter_config .*note.txt: "),
    ("--adapter_config {prefix}", "PREFIX_TUNING"),
    # the model
    ("--resolution 15", "--resolution: got 15, needs a multiple of 2"),
    ("--aspect_ratio_buckets 16,16;15,17", "needs a multiple of 2"),
    (
        "--aspect_ratio_buckets 16x16",
        "--aspect_ratio_buckets: got '16x16', needs sizes as \"height,width;height,width\"",
    ),
    ("--aspect_ratio_buckets 0,16", "--aspect_ratio_buckets: got '0,16', needs sizes as"),
    ("--target_modules to_query", "no layer is called 'to_query'"),
    ("--num_blocks 7", "num_blocks=7 does not divide the input dimension 16; try 1, 2, 4, 8, 16"),
    # packages and machines
    ("--push_to_hub", "--push_to_hub"),
    pytest.param(
        "--enable_xformers_memory_efficient_attention",
        r"--attention_backend xformers: .* pip install 'ether-diffusion\[xformers\]'",
        marks=pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed"),
    ),
    pytest.param(
        "--use_8bit_adam",
        r'--use_8bit_adam: bitsandbytes is not installed; pip install "ether-diffusion\[bitsandbytes\]"',
        marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there"),
    ),
]


@pytest.fixture
def places(tmp_path, photographs) -> dict[str, Path]:
    """What the flags speak of, by name."""
    places = {name: tmp_path / name for name in ("empty", "damaged", "texts")}
    for folder in places.values():
        folder.mkdir()
    torn = places["damaged"] / "torn.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(torn)
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (places["texts"] / "text.png").write_bytes(b"hello")
    places["new"] = tmp_path / "new"
    places["note"] = tmp_path / "note.txt"
    places["note"].write_text("a note")
    for kind, config in {"lora": {"r": 2}, "ia3": {"feedforward_modules": []}, "prefix": {}}.items():
        peft_type = {"prefix": "PREFIX_TUNING"}.get(kind, kind.upper())
        places[kind] = tmp_path / f"{kind}.json"
        targets = {} if kind == "prefix" else {"target_modules": ["to_q"]}
        places[kind].write_text(json.dumps({"peft_type": peft_type, **targets, **config}))
    return {**places, "photos": photographs}


@pytest.mark.parametrize(("flags", "message"), CASES)
def test_a_wrong_flag_is_one_clear_error_and_nothing_is_loaded_or_written(
    train, places, tmp_path, monkeypatch, capsys, flags, message
):
    def no_loading(*args, **kwargs):
        raise AssertionError("the weights were read before the flags were checked")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", no_loading)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = [word.strip("'").format(**places) for word in flags.split()]
    error = refusal(capsys, train, *words)
    assert re.search(message, error), error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == there


def test_a_method_without_a_default_learning_rate_needs_one(places, photographs, tiny_pipeline_folder, capsys):
    flags = ["--pretrained_model_name_or_path", tiny_pipeline_folder, "--instance_data_dir", photographs]
    flags += ["--instance_prompt", "sks toy", "--adapter_config", places["ia3"]]
    error = refusal(capsys, dreambooth.main, [*map(str, flags)])
    assert "--learning_rate: is missing; there is no default for IA3" in error
