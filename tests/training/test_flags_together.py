"""`train_dreambooth_ether.py`: flags work together, every two of them that fit, and what comes of it loads."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from helpers.class_images import PRIOR
from helpers.pipelines import generate
from peft import PeftModel
from PIL import Image

import ether_diffusion  # noqa: F401  (gives pipelines their *_ether_* methods)
from ether_diffusion.training.options import METHODS


def loaded(pipe: DiffusionPipeline, folder: Path, method: str, components: list[str]) -> DiffusionPipeline:
    """The pipeline with the result on it, as a user of stock libraries loads it."""
    if method == "full":
        return type(pipe).from_pretrained(folder)
    if method in ("ether", "ether_plus"):
        pipe.load_ether_weights(folder)
    elif method == "lora":
        pipe.load_lora_weights(folder)
    else:
        for name in components:
            setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), folder / name).base_model.model)
    return pipe


FACTORS = {
    "family": ("sd", "sd v", "sdxl"),
    "method": (*METHODS, "config"),
    "precision": ("no", "bf16", "fp16"),
    "encoder": ("", "--train_text_encoder", "--train_text_encoder --text_encoder_lr 0.01"),
    "data": ("folder", "captions"),
    "views": ("", "--random_flip", "--center_crop", "--aspect_ratio_buckets 16,16;12,24"),
    "prior": (False, True),
    "cache": ("", "--cache_latents", "--pre_compute_text_embeddings", "--cache_latents --offload"),
    "optimizer": ("adamw", "prodigy"),
    "schedule": ("constant", "cosine_with_restarts --lr_num_cycles 2", "polynomial --lr_warmup_steps 1"),
    "batch": ("--train_batch_size 1", "--train_batch_size 2 --gradient_accumulation_steps 2"),
    "loss": ("", "--snr_gamma 5", "--noise_offset 0.1 --max_grad_norm 0.1"),
    "ema": ("", "--use_ema"),
    "memory": ("", "--gradient_checkpointing", "--attention_backend sdpa"),
    "generate": (
        "--num_validation_images 0",
        "--num_validation_images 1 --validation_steps 1 --num_inference_steps 1",
    ),
}


def fits(row: dict) -> bool:
    """Whether these go together; what does not is in the test of bad flags."""
    embeddings = row.get("cache") == "--pre_compute_text_embeddings" and row.get("encoder")
    prodigy = row.get("optimizer") == "prodigy" and "--text_encoder_lr" in row.get("encoder", "")
    return not (embeddings or prodigy)


def pairs_of(row: dict) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def covering_rows() -> list[dict]:
    """Few rows in which every two values of two factors that fit come together, found greedily."""
    missing = set()
    for a, b in itertools.combinations(FACTORS, 2):
        for row in ({a: x, b: y} for x in FACTORS[a] for y in FACTORS[b]):
            missing |= pairs_of(row) if fits(row) else set()
    rows = []
    while missing:
        row = dict(min(missing, key=lambda pair: str(sorted(pair))))
        for name in FACTORS:
            if name not in row:
                longer = [{**row, name: value} for value in FACTORS[name] if fits({**row, name: value})]
                row = max(longer, key=lambda each: len(pairs_of(each) & missing))
        rows.append(row)
        missing -= pairs_of(row)
    return rows


ROWS = covering_rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{k}-{row['family']}-{row['method']}" for k, row in enumerate(ROWS)])
def test_flags_work_together_and_the_result_loads(train, bases, photographs, tmp_path, row):
    images = tmp_path / "images"
    images.mkdir()
    for k, size in enumerate([(24, 24), (40, 20)]):
        Image.effect_noise(size, 90).convert("RGB").save(images / f"{k}.png")
    if row["data"] == "captions":
        (images / "0.txt").write_text("another caption")
    flags = ["--pretrained_model_name_or_path", bases[row["family"]], "--instance_data_dir", images]
    if row["method"] == "config":
        targets = ["to_q", "to_v"]
        (tmp_path / "config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": targets}))
        flags += ["--adapter_config", tmp_path / "config.json"]
    else:
        flags += ["--method", row["method"]]
    if row["prior"]:
        flags += [*PRIOR, "--class_data_dir", photographs]
    flags += ["--mixed_precision", row["precision"], "--lr_scheduler", *row["schedule"].split()]
    flags += ["--optimizer", row["optimizer"], "--learning_rate", 1.0 if row["optimizer"] == "prodigy" else 0.01]
    for name in ("encoder", "views", "cache", "batch", "loss", "ema", "memory", "generate"):
        flags += row[name].split()
    result, folder = train(*flags)
    assert len(result.losses) == 3 and np.isfinite(result.losses).all()

    pipe = DiffusionPipeline.from_pretrained(bases[row["family"]])
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe)
    components = ["unet", *(n for n in ("text_encoder", "text_encoder_2") if row["encoder"] and hasattr(pipe, n))]
    tuned = loaded(pipe, folder, "lora" if row["method"] == "config" else row["method"], components)
    tuned.set_progress_bar_config(disable=True)
    if not (
        row["optimizer"] == "prodigy" or "polynomial" in row["schedule"]
    ):  # those start with steps next to nothing
        assert np.abs(generate(tuned) - before).max() > 1e-4
    assert np.isfinite(generate(tuned)).all()
    assert (folder / "README.md").exists() and (folder / "grid.png").exists() == ("images 1" in row["generate"])
    assert (folder / "validation").exists() == ("images 1" in row["generate"])
