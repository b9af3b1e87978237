"""Learning rate and steps of each method on a miniature: what the script's defaults are chosen by.

    python benchmarks/learning_rate_sweep.py --output_dir out/sweep
    python benchmarks/learning_rate_sweep.py --output_dir out/sweep-dit --base miniature-dit

Every subject of the miniature's world is learned from five views. Measured along the way, over fixed noises and
timesteps: the denoising loss on the sixth view (does it know the subject?) and on images of the world (has it
forgotten anything?). Prints a table and writes it as JSON, row by row: the same command goes on where it was stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from denoising import denoising_loss
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from result_file import ResultFile
from subjects import base_settings

from ether_diffusion.base_models import MINIATURE, MINIATURES
from ether_diffusion.images import find_images
from ether_diffusion.miniature import load_pipeline
from ether_diffusion.miniature.world import VIEWS, Subject, draw_scene, subjects
from ether_diffusion.training.data import TrainingImages, examples_of
from ether_diffusion.training.families import family_of
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import add_adapters
from ether_diffusion.training.objectives import DenoisingObjective, ImageSet
from ether_diffusion.training.optimizers import parameter_groups
from ether_diffusion.training.options import ETHER_METHODS, METHODS, AdapterOptions, OptimizationOptions


def measure(pipe: DiffusionPipeline, subject: Subject) -> tuple[float, float]:
    """Denoising loss on the view that was held out, and on eight images of the world."""
    view = subject.view(VIEWS - 1)
    own = denoising_loss(pipe, view.render().image, f"a photo of sks {subject.class_name}")
    scenes = [draw_scene("prior", k) for k in range(8)]
    prior = sum(denoising_loss(pipe, s.render().image, s.caption, noises=1) for s in scenes) / len(scenes)
    return own, prior


def learn(
    subject: Subject, method: str, rate: float, checkpoints: list[int], seed: int, base: str
) -> list[tuple[float, float]]:
    """Losses after each of the given numbers of steps; at a constant rate, a short run is the start of a long one."""
    pipe = load_pipeline(base)
    family = family_of(pipe)
    family.freeze(torch.device("cpu"))
    adapter = AdapterOptions(method=method)
    configs = configs_of(read_method(adapter), type(family), adapter)
    models = {name: family.component(name) for name in configs}
    add_adapters(models, configs, seed=seed)
    options = OptimizationOptions(max_train_steps=max(checkpoints), learning_rate=rate)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(VIEWS - 1):
            subject.view(k).render().image.save(Path(folder, f"{k}.png"))
        examples = examples_of(find_images(folder), f"a photo of sks {subject.class_name}")
        side = family.native_resolution
        images = TrainingImages(examples, targets=[(side, side)], group_size=options.train_batch_size, seed=seed)
        Trainer(
            Accelerator(cpu=True),
            DenoisingObjective(family, [ImageSet(images, family, seed=seed)], trained=list(configs)),
            parameter_groups(models, denoiser=family.denoiser, options=options),
            options,
            validate=lambda step: measured.append(measure(pipe, subject)),
            validate_after=lambda step: step in checkpoints,
        ).train()
    return measured


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", choices=list(MINIATURES), default=MINIATURE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(ETHER_METHODS))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1, 1.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--subjects", type=int, default=3, help="how many of the world's subjects")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen = subjects()[:: max(1, len(subjects()) // args.subjects)][: args.subjects]

    base = mean([measure(load_pipeline(args.base), subject) for subject in chosen])
    names = [subject.name for subject in chosen]
    settings = {**base_settings(args.base), "seed": args.seed, "subjects": names}
    if args.base != MINIATURE:  # which files of before there were two do not name
        settings["model"] = args.base
    results = ResultFile(args.output_dir / "learning_rate_sweep.json", settings, machine=machine(), base=base)
    print(f"{'':12}{'rate':>8}{'steps':>6}{'held out':>10}{'prior':>10}")
    print(f"{'base':26}{base['held_out']:>10.4f}{base['prior']:>10.4f}", flush=True)
    for method in args.methods:
        for rate in args.learning_rates:
            keys = [{"method": method, "learning_rate": rate, "steps": steps} for steps in sorted(set(args.steps))]
            missing = [key for key in keys if results.find(**key) is None]
            if missing:
                steps = [key["steps"] for key in missing]
                runs = [learn(subject, method, rate, steps, args.seed, args.base) for subject in chosen]
                for key, of_subjects in zip(missing, zip(*runs, strict=True), strict=True):
                    results.add({**key, **mean(of_subjects)})
            for row in (results.find(**key) for key in keys):
                line = f"{method:12}{rate:>8.0e}{row['steps']:>6}{row['held_out']:>10.4f}{row['prior']:>10.4f}"
                print(line, flush=True)


def mean(measured: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The two losses, each as its mean over the subjects."""
    return {name: sum(each[j] for each in measured) / len(measured) for j, name in enumerate(("held_out", "prior"))}


if __name__ == "__main__":
    main()
