"""A real fine-tune on the miniature, from photographs to an image grid, as a user would do it.

    python -m ether_diffusion.miniature.quickstart --output_dir out/quickstart

Draws photographs of a subject that the miniature has never seen, calls `accelerate launch train_dreambooth_ether.py`,
loads the adapter into a fresh pipeline, and compares images of the same seeds before and after.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Generator

import ether_diffusion  # noqa: F401  (gives pipelines their *_ether_* methods)
from ether_diffusion.miniature import ClipScore, load_pipeline
from ether_diffusion.miniature.world import Subject, subjects

SCRIPT = Path(__file__).resolve().parents[2] / "train_dreambooth_ether.py"
WEIGHTS = "pytorch_ether_weights.safetensors"
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
CELL, MARGIN = 128, 24


def draw_photographs(subject: Subject, folder: Path) -> list[Image.Image]:
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [subject.view(k).render().image for k in range(PHOTOGRAPHS)]
    for k, photograph in enumerate(photographs):
        photograph.save(folder / f"{k:02}.png")
    return photographs


def train(photographs: Path, class_name: str, output_dir: Path, extra: list[str]) -> None:
    if not SCRIPT.is_file():
        raise SystemExit(f"{SCRIPT.name} is not beside the package: run the quickstart from a clone of the repository")
    command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT)]
    command += ["--instance_data_dir", str(photographs), "--instance_prompt", f"a photo of sks {class_name}"]
    command += ["--output_dir", str(output_dir), "--seed", "0", *extra]
    subprocess.run(command, check=True)


def generate(pipe: StableDiffusionPipeline, prompts: list[str], seeds: int) -> list[Image.Image]:
    """For every prompt, `seeds` images from the seeds 0, 1, …"""
    pictures = []
    for prompt in prompts:
        generators = [Generator().manual_seed(seed) for seed in range(seeds)]
        pictures += pipe([prompt] * seeds, num_inference_steps=25, guidance_scale=5.0, generator=generators).images
    return pictures


def image_grid(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Titled rows of images, enlarged pixel by pixel."""
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new("RGB", (columns * CELL, len(rows) * (CELL + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, pictures) in enumerate(rows):
        top = k * (CELL + MARGIN)
        draw.text((4, top + 6), title, fill="black")
        for j, picture in enumerate(pictures):
            canvas.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (j * CELL, top + MARGIN))
    return canvas


def main() -> None:
    names = [subject.name for subject in subjects()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/quickstart"))
    parser.add_argument("--subject", choices=names, default=names[0], help="which unseen figure to learn")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args, training_flags = parser.parse_known_args()  # everything else goes to the training script
    subject = next(s for s in subjects() if s.name == args.subject)

    photographs = draw_photographs(subject, args.output_dir / "photographs")
    adapter = args.output_dir / "adapter"
    train(args.output_dir / "photographs", subject.class_name, adapter, training_flags)

    own_prompts = [f"a photo of sks {subject.class_name} {setting}" for setting in SETTINGS]
    others = list(OTHER_PROMPTS)
    pipe, score = load_pipeline(), ClipScore()
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe, own_prompts, args.seeds), generate(pipe, others, 1)
    pipe.load_ether_weights(adapter)
    after = generate(pipe, own_prompts, args.seeds), generate(pipe, others, 1)

    grid = args.output_dir / "grid.png"
    shown = slice(None, None, args.seeds)  # the first seed of every prompt
    image_grid(
        [
            (f"{PHOTOGRAPHS} photographs of the subject", photographs),
            (
                f"base: a photo of sks {subject.class_name} {', '.join(s.removeprefix('on a ') for s in SETTINGS)}",
                before[0][shown],
            ),
            ("ETHER: the same prompts and seeds", after[0][shown]),
            ("base: prompts without the subject", before[1]),
            ("ETHER: the same prompts and seeds", after[1]),
        ]
    ).save(grid)

    count = sum(p.numel() for name, p in pipe.unet.named_parameters() if ".ether_" in name)
    size = (adapter / WEIGHTS).stat().st_size
    subject_scores = [score.image_similarity(pictures[0], photographs) for pictures in (before, after)]
    prompt_scores = [score.text_similarity(pictures[1], others) for pictures in (before, after)]
    print(f"\n{'parameters':42}{count:>10,}\n{'file size':42}{size / 1024:>8.0f} kB")
    print(f"\n{'':42}{'before':>10}{'after':>10}")
    print(f"{'similarity to the subject (CLIP-I)':42}{subject_scores[0]:>10.3f}{subject_scores[1]:>10.3f}")
    print(f"{'similarity to prompts without it (CLIP-T)':42}{prompt_scores[0]:>10.3f}{prompt_scores[1]:>10.3f}")
    print(f"\n{grid}")


if __name__ == "__main__":
    main()
