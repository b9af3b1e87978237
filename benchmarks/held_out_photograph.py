"""Does a fine-tune on a subject's photographs help on one that it has not seen?

    python benchmarks/held_out_photograph.py --data_dir photos_by_subject --output_dir out/held_out

For every folder of photographs in --data_dir, trains on all but the last with `accelerate launch
train_dreambooth_ether.py` (other flags go to it) and compares the denoising loss on the last one, over fixed
noises and timesteps, between the base model and the tuned one. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import ether_diffusion  # noqa: F401  (gives pipelines their *_ether_* methods)
from ether_diffusion import miniature
from ether_diffusion.training.data import find_images, read_image
from ether_diffusion.training.objective import denoising_loss

SCRIPT = Path(__file__).resolve().parents[1] / "train_dreambooth_ether.py"


def measure(folder: Path, model: Path | str, output_dir: Path, flags: list[str]) -> dict:
    *seen, held_out = find_images(folder)
    photographs = output_dir / "photographs"
    photographs.mkdir(parents=True)
    for path in seen:
        shutil.copy(path, photographs)
    prompt = f"a photo of sks {folder.name.replace('_', ' ')}"
    command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), *flags]
    command += ["--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photographs)]
    command += ["--instance_prompt", prompt, "--output_dir", str(output_dir / "adapter")]
    subprocess.run(command, check=True)

    pipe = StableDiffusionPipeline.from_pretrained(model)
    losses = {}
    for name in ("base", "tuned"):
        if name == "tuned":
            pipe.load_ether_weights(output_dir / "adapter")
        losses[f"{name}_held_out"] = denoising_loss(pipe, read_image(held_out), prompt)
        losses[f"{name}_seen"] = sum(denoising_loss(pipe, read_image(p), prompt) for p in seen) / len(seen)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="one folder of photographs for each subject")
    parser.add_argument("--model", default=miniature.FOLDER, help="a Stable Diffusion folder or Hub id")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, flags = parser.parse_known_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)

    rows = {}
    for folder in sorted(p for p in args.data_dir.iterdir() if p.is_dir()):
        rows[folder.name] = measure(folder, args.model, args.output_dir / folder.name, flags)
    report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "flags": flags}
    report["denoising_loss"] = rows
    (args.output_dir / "held_out_photograph.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'subject':12}{'held out: base':>16}{'tuned':>8}{'ratio':>8}{'seen: base':>14}{'tuned':>8}")
    for name, row in rows.items():
        ratio = row["tuned_held_out"] / row["base_held_out"]
        print(
            f"{name:12}{row['base_held_out']:>16.4f}{row['tuned_held_out']:>8.4f}{ratio:>8.2f}"
            f"{row['base_seen']:>14.4f}{row['tuned_seen']:>8.4f}"
        )


if __name__ == "__main__":
    main()
