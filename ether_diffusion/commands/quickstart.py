"""A real fine-tune on the miniature that comes with the package, in minutes and without a GPU or a download.

  ether-diffusion quickstart
  ether-diffusion quickstart --control
  ether-diffusion quickstart --base miniature-dit

Teaches the miniature a subject that it has never seen, from five drawn photographs, loads the adapter into a fresh
pipeline, and compares images of the same seeds before and after: grid.png in --output_dir. With --control: draws
images with their semantic maps (where each shape, part and the background is), trains light control on them, and
scores it on maps that the training has not seen: evaluation/sheet.png. --base miniature-dit does either on a
transformer with flow matching instead of a UNet.

Training runs as you would run it, by `python -m ether_diffusion.training.dreambooth` (or `.control`); what is no flag
of this command goes there, such as --max_train_steps 400 or --method lora. The same command goes on where it was
stopped; a finished quickstart is written over with --overwrite_output_dir alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Generator

from ether_diffusion.base_models import MINIATURE, MINIATURES
from ether_diffusion.commands.evaluate_control import evaluate_and_show
from ether_diffusion.errors import InputError
from ether_diffusion.evaluation.options import ControlEvaluation
from ether_diffusion.images import image_grid
from ether_diffusion.miniature.control_data import TRAINING_SEED, write_control_data
from ether_diffusion.miniature.world import subjects

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SETTINGS = ("on a red background", "on a green background", "on a striped blue background", "on a white background")
OTHER_PROMPTS = (
    "a red circle on a white background",
    "a large yellow star on a blue background",
    "a green heart to the left of an orange square on a gray background",
    "two purple diamonds on a yellow background",
    "a house with white walls and a red roof on a cyan background",
    "a face with a pink head and black hair on a green background",
)
PHOTOGRAPHS = 5
CONTROL_FLAGS = [
    "--train_batch_size", "32", "--max_train_steps", "800", "--control_lr", "5e-3",
    "--mixed_precision", "bf16", "--cache_latents", "--pre_compute_text_embeddings", "--seed", "0",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [subject.name for subject in subjects()]
    parser.allow_abbrev = False  # --seed is the training's, not short for --seeds
    parser.add_argument("--control", action="store_true", help="Light control by semantic maps, instead of a subject.")
    parser.add_argument("--base", choices=list(MINIATURES), default=MINIATURE, help="Default: %(default)s.")
    parser.add_argument("--output_dir", type=Path, help="Default: out/quickstart, with --control out/control.")
    parser.add_argument("--subject", choices=names, default=names[0], help="Which unseen figure to learn.")
    parser.add_argument("--seeds", type=int, default=4, help="Images per prompt. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=2000, help="With --control: images to train on.")
    parser.add_argument("--held_out", type=int, default=48, help="With --control: maps to evaluate on.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace what an earlier one left.")
    parser.set_defaults(other_flags=[])


def run(args: argparse.Namespace) -> None:
    """Train, and compare before and after.

    Raises:
        InputError: the folder holds a finished quickstart; nothing was written.
        SystemExit: the training failed, and has said why.
    """
    if args.control:
        learn_control(args, args.output_dir or Path("out/control"))
    else:
        learn_subject(args, args.output_dir or Path("out/quickstart"))


def plan_training(adapter: Path, result: Path, *, overwrite: bool) -> list[str] | None:
    """Flags of the training that follow from what an earlier quickstart left; None where its training is complete.

    Args:
        adapter: the training's output folder.
        result: what is written last of all.
        overwrite: whether to start anew in any case.

    Raises:
        InputError: everything is there.
    """
    from ether_diffusion.training.card import CARD_NAME
    from ether_diffusion.training.checkpoint_files import PREFIX

    if overwrite:
        return ["--overwrite_output_dir"]
    if (adapter / CARD_NAME).exists():  # a training writes it last
        if result.exists():
            raise InputError(
                f"--output_dir {adapter.parent}: holds a finished quickstart, which this one would write over; take "
                "another folder, or give --overwrite_output_dir"
            )
        print(f"{adapter}: is trained already; only what comes after it is done now", flush=True)
        return None
    if any(adapter.glob(f"{PREFIX}*")):
        print(f"{adapter}: the training was stopped, and goes on from its last checkpoint", flush=True)
        return ["--resume_from_checkpoint", "latest"]
    return []


def train(module: str, base: str, flags: Sequence[object]) -> None:
    """Call a training of the package as a user does.

    base: the miniature's name.

    Raises:
        SystemExit: it failed, and has said why.
    """
    # Not by `accelerate launch`, which would print a traceback of its own below the training's one line.
    command = [sys.executable, "-m", f"ether_diffusion.training.{module}"]
    command += [] if base == MINIATURE else ["--pretrained_model_name_or_path", base]
    if code := subprocess.run([*command, *map(str, flags)]).returncode:
        raise SystemExit(code)


# A subject ------------------------------------------------------------------------------------------------------


def learn_subject(args: argparse.Namespace, output_dir: Path) -> None:
    from ether_diffusion.adapters.components import models_of
    from ether_diffusion.adapters.schema import WEIGHTS_NAME
    from ether_diffusion.metrics import image_similarity, text_similarity
    from ether_diffusion.miniature import ClipScore, load_pipeline

    subject = next(each for each in subjects() if each.name == args.subject)
    photographs = [subject.view(k).render().image for k in range(PHOTOGRAPHS)]
    adapter, prompt = output_dir / "adapter", f"a photo of sks {subject.class_name}"
    given = plan_training(adapter, output_dir / "grid.png", overwrite=args.overwrite_output_dir)
    (output_dir / "photographs").mkdir(parents=True, exist_ok=True)
    for k, photograph in enumerate(photographs):
        photograph.save(output_dir / "photographs" / f"{k:02}.png")
    if given is not None:
        (output_dir / "grid.png").unlink(missing_ok=True)  # of the adapter before
        flags = ["--instance_data_dir", output_dir / "photographs", "--instance_prompt", prompt, *given]
        train("dreambooth", args.base, [*flags, "--output_dir", adapter, "--seed", 0, *args.other_flags])

    own_prompts = [f"{prompt} {setting}" for setting in SETTINGS]
    pipe, clip = load_pipeline(args.base), ClipScore()
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe, own_prompts, args.seeds), generate(pipe, OTHER_PROMPTS, 1)
    pipe.load_ether_weights(adapter)
    after = generate(pipe, own_prompts, args.seeds), generate(pipe, OTHER_PROMPTS, 1)

    first = slice(None, None, args.seeds)  # the first seed of every prompt
    settings = ", ".join(setting.removeprefix("on a ") for setting in SETTINGS)
    rows = [
        (f"{PHOTOGRAPHS} photographs of the subject", photographs),
        (f"base: {prompt} {settings}", before[0][first]),
        ("ETHER: the same prompts and seeds", after[0][first]),
        ("base: prompts without the subject", before[1]),
        ("ETHER: the same prompts and seeds", after[1]),
    ]
    image_grid(rows).save(output_dir / "grid.png")
    models = models_of(pipe).values()
    count = sum(p.numel() for model in models for name, p in model.named_parameters() if ".ether_" in name)
    size = (adapter / WEIGHTS_NAME).stat().st_size
    print(f"\n{'parameters':42}{count:>10,}\n{'file size':42}{size / 1024:>8.0f} kB")
    print(f"\n{'':42}{'before':>10}{'after':>10}")
    subject_scores = [image_similarity(own, photographs, clip) for own, _ in (before, after)]
    prompt_scores = [text_similarity(others, OTHER_PROMPTS, clip) for _, others in (before, after)]
    print(f"{'similarity to the subject (CLIP-I)':42}{subject_scores[0]:>10.3f}{subject_scores[1]:>10.3f}")
    print(f"{'similarity to prompts without it (CLIP-T)':42}{prompt_scores[0]:>10.3f}{prompt_scores[1]:>10.3f}")
    print(f"\n{output_dir / 'grid.png'}")


def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: int) -> list[Image.Image]:
    """For every prompt, `seeds` images from the seeds 0, 1, …"""
    images = []
    for prompt in prompts:
        generators = [Generator().manual_seed(seed) for seed in range(seeds)]
        images += pipe([prompt] * seeds, num_inference_steps=25, guidance_scale=5.0, generator=generators).images
    return images


# Control --------------------------------------------------------------------------------------------------------


def learn_control(args: argparse.Namespace, output_dir: Path) -> None:
    data, adapter = output_dir / "data", output_dir / "adapter"
    sheet = output_dir / "evaluation" / "sheet.png"
    given = plan_training(adapter, sheet, overwrite=args.overwrite_output_dir)
    if given is not None:
        sheet.unlink(missing_ok=True)  # of the adapter before
        draw_pairs(data, args.pairs)
        train_control(data, adapter, args.base, ["--learning_rate", "2e-3", *given, *args.other_flags])
    evaluate_and_show(
        ControlEvaluation(
            base=args.base,
            adapter=str(adapter),
            output_dir=output_dir / "evaluation",
            miniature=args.held_out,
            num_inference_steps=10,
            batch_size=16,
            evaluator_dir=output_dir / "evaluator",
        )
    )


def draw_pairs(data: Path, count: int) -> None:
    """Have so many pairs in a folder, which are drawn where they are not there yet."""
    lines = data / "metadata.jsonl"  # written last
    if lines.exists() and len(lines.read_text("utf-8").splitlines()) == count:
        return
    lines.unlink(missing_ok=True)
    write_control_data(data, count, TRAINING_SEED)


def train_control(data: Path, output_dir: Path, base: str, flags: Sequence[str]) -> None:
    """Train light control of a miniature on a folder of pairs; `flags` take the place of CONTROL_FLAGS."""
    train("control", base, ["--train_data_dir", data, "--output_dir", output_dir, *CONTROL_FLAGS, *flags])
