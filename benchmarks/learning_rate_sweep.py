"""Learning rate and steps for ETHER and ETHER+ on the miniature: what the script's defaults are chosen by.

    python benchmarks/learning_rate_sweep.py --output_dir out/sweep

Every subject of the miniature's world is learned from five views. Measured along the way, over fixed noises and
timesteps: the denoising loss on the sixth view (does it know the subject?) and on pictures of the world (has it
forgotten anything?). Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

from ether_diffusion import EtherConfig
from ether_diffusion.miniature import FOLDER, load_pipeline
from ether_diffusion.miniature.evaluate import checksum
from ether_diffusion.miniature.world import VIEWS, Subject, draw_scene, subjects
from ether_diffusion.training.adapters import add_adapters, trained_parameters
from ether_diffusion.training.data import InstanceImages, find_images
from ether_diffusion.training.families import family_of
from ether_diffusion.training.loop import train
from ether_diffusion.training.objective import DreamBoothObjective, denoising_loss
from ether_diffusion.training.options import OptimizationOptions


def measure(pipe, subject: Subject) -> tuple[float, float]:
    """Denoising loss on the view that was held out, and on eight pictures of the world."""
    view = subject.view(VIEWS - 1)
    own = denoising_loss(pipe, view.render().image, f"a photo of sks {subject.class_name}")
    scenes = [draw_scene("prior", k) for k in range(8)]
    prior = sum(denoising_loss(pipe, s.render().image, s.caption, noises=1) for s in scenes) / len(scenes)
    return own, prior


def learn(subject: Subject, method: str, rate: float, checkpoints: list[int], seed: int) -> list[tuple[float, float]]:
    """Losses after each of the given numbers of steps; at a constant rate, a short run is the start of a long one."""
    pipe = load_pipeline()
    family = family_of(pipe)
    family.freeze(torch.device("cpu"))
    configs = {"unet": EtherConfig(method=method)}
    models = {"unet": pipe.unet}
    add_adapters(models, configs, seed=seed)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(VIEWS - 1):
            subject.view(k).render().image.save(Path(folder, f"{k}.png"))
        prompt = f"a photo of sks {subject.class_name}"
        images = InstanceImages(find_images(folder), prompt=prompt, resolution=family.native_resolution, seed=seed)
        train(
            Accelerator(cpu=True),
            DreamBoothObjective(family, images, trained=["unet"], seed=seed),
            trained_parameters(models, configs),
            OptimizationOptions(max_train_steps=max(checkpoints)),
            learning_rate=rate,
            after_step=lambda step: measured.append(measure(pipe, subject)) if step in checkpoints else None,
        )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1, 1.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--subjects", type=int, default=3, help="how many of the world's subjects")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chosen = subjects()[:: max(1, len(subjects()) // args.subjects)][: args.subjects]

    base = [measure(load_pipeline(), subject) for subject in chosen]
    rows = []
    for method in ("ether", "ether_plus"):
        for rate in args.learning_rates:
            runs = [learn(subject, method, rate, args.steps, args.seed) for subject in chosen]
            for k, steps in enumerate(sorted(args.steps)):
                own, prior = (sum(run[k][j] for run in runs) / len(runs) for j in (0, 1))
                rows.append({"method": method, "learning_rate": rate, "steps": steps, "held_out": own, "prior": prior})
                print(f"{method:12}{rate:>8.0e}{steps:>6}{own:>10.4f}{prior:>10.4f}", flush=True)
    report = {
        "weights_sha256": checksum(FOLDER),
        "machine": platform.processor() or platform.machine(),
        "subjects": [subject.name for subject in chosen],
        "base": {name: sum(b[j] for b in base) / len(base) for j, name in enumerate(("held_out", "prior"))},
        "rows": rows,
    }
    (args.output_dir / "learning_rate_sweep.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'base':26}{report['base']['held_out']:>10.4f}{report['base']['prior']:>10.4f}")


if __name__ == "__main__":
    main()
