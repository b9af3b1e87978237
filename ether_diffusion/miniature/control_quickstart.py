"""Light control on the miniature, from maps to a sheet of images and a table of scores, as a user would do it.

    python -m ether_diffusion.miniature.control_quickstart --output_dir out/control

Draws images with their semantic maps (where each shape, part and the background is), calls `accelerate launch
train_controlnet_ether.py`, and has `ether-diffusion evaluate-control` judge the result on maps that it has not seen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ether_diffusion.miniature.control_data import write_control_data

SCRIPT = Path(__file__).resolve().parents[2] / "train_controlnet_ether.py"
TRAINING_SEED = "control training"
SETTINGS = [
    "--train_batch_size", "32", "--max_train_steps", "800", "--control_lr", "5e-3",
    "--mixed_precision", "bf16", "--cache_latents", "--pre_compute_text_embeddings", "--seed", "0",
]  # fmt: skip


def train(data: Path, output_dir: Path, extra: list[str]) -> None:
    """Call the training script as a user does; those in `extra` take the place of SETTINGS."""
    if not SCRIPT.is_file():
        raise SystemExit(f"{SCRIPT.name} is not beside the package: run this from a clone of the repository")
    command = [sys.executable, "-m", "accelerate.commands.launch", str(SCRIPT), "--train_data_dir", str(data)]
    subprocess.run([*command, "--output_dir", str(output_dir), *SETTINGS, *extra], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/control"))
    parser.add_argument("--pairs", type=int, default=2000, help="images to train on")
    parser.add_argument("--held_out", type=int, default=48, help="maps to judge on")
    args, training_flags = parser.parse_known_args()  # everything else goes to the training script

    data = args.output_dir / "data"
    if not (data / "metadata.jsonl").exists():
        write_control_data(data, args.pairs, TRAINING_SEED)
    train(data, args.output_dir / "adapter", ["--learning_rate", "2e-3", *training_flags])
    command = [
        sys.executable,
        "-m",
        "ether_diffusion.commands.main",
        "evaluate-control",
        "--miniature",
        str(args.held_out),
    ]
    command += ["--adapter", str(args.output_dir / "adapter"), "--output_dir", str(args.output_dir / "evaluation")]
    command += ["--num_inference_steps", "10", "--batch_size", "16", "--judge_dir", str(args.output_dir / "judge")]
    subprocess.run(command, check=True)
    print(args.output_dir / "evaluation" / "sheet.png")


if __name__ == "__main__":
    main()
