"""Measure a miniature: does it generate what a prompt says, for combinations that it was never trained on?

    python tools/evaluate_miniature.py --output_dir out/evaluation
    python tools/evaluate_miniature.py --output_dir out/evaluation-dit --model_dir miniature-dit

A small classifier is trained here on the world's own renders, tested on renders it has not seen, and
then names the shape and the colours in images generated for pairs of shape and colour that are held out of training.
Prints a table with the checksum of the weights, and writes it as JSON beside a grid of the images; the transformer's
figures go to benchmarks/results/miniature_dit.json as well.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.base_models import MINIATURE, base_path, miniature_name, open_pipeline
from ether_diffusion.files import checksum, replace_file
from ether_diffusion.images import image_grid
from ether_diffusion.miniature.render import COLOURS, PATTERNS, to_tensor
from ether_diffusion.miniature.scene import Scene, Shape
from ether_diffusion.miniature.shapes import SHAPES
from ether_diffusion.miniature.world import POSITIONS, SIZES, article, describe_background, held_out_pairs

KINDS = ("shape", "colour", "background")
COLUMNS = 20  # of the grid, and images generated at once
RESULTS = {"miniature-dit": Path(__file__).parents[1] / "benchmarks" / "results" / "miniature_dit.json"}
"""Where a miniature's figures go besides --output_dir, unless told otherwise."""
NAMES = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "background": tuple(COLOURS)}


def single_shape(seed: str, index: int, pairs: list[tuple[str, str]] | None = None) -> Scene:
    """A scene with one shape, of any pair of shape and colour or of the given ones, on any other background."""
    rng = random.Random(f"{seed}/{index}")
    shape, colour = rng.choice(pairs or [(s, c) for s in SHAPES for c in COLOURS])
    background = rng.choice([c for c in COLOURS if c != colour])
    pattern = rng.choice(PATTERNS) if rng.random() < 0.4 else "plain"
    size, where = rng.choice(list(SIZES)), rng.choice(list(POSITIONS))
    x, y = (at + rng.uniform(-0.05, 0.05) for at in POSITIONS[where])
    thing = Shape(shape, colour, size, x, y, rng.uniform(*SIZES[size]))
    words = article(" ".join(w for w in (size, colour, shape) if w))
    caption = f"{words} on {describe_background(background, pattern)}"
    return Scene((thing,), background, pattern, f"{seed}/{index}/tones", caption)


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """The truth for each of KINDS, as indices into NAMES."""
    named = [(scene.things[0].name, scene.things[0].colour, scene.background) for scene in scenes]
    return {
        kind: torch.tensor([NAMES[kind].index(n) for n in column])
        for kind, column in zip(KINDS, zip(*named, strict=True), strict=True)
    }


class Classifier(nn.Module):
    """Names the shape, its colour and the background's colour in an image with one shape."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for k in range(4):  # 64 → 32 → 16 → 8 → 4 pixels
            out = width * (k + 1)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({kind: nn.Linear(256, len(names)) for kind, names in NAMES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.features(pixels)
        return {kind: head(features) for kind, head in self.heads.items()}

    @torch.no_grad()
    def name(self, images: list[Image.Image]) -> dict[str, Tensor]:
        batches = [self(to_tensor(images[k : k + 128])) for k in range(0, len(images), 128)]
        return {kind: torch.cat([batch[kind].argmax(-1) for batch in batches]) for kind in KINDS}


def train_classifier(steps: int, batch: int = 64) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", mininterval=5):
        scenes = [single_shape("judge/train", step * batch + k) for k in range(batch)]
        answers, truth = classifier(to_tensor([scene.render().image for scene in scenes])), labels_of(scenes)
        loss = sum(F.cross_entropy(answers[kind], truth[kind]) for kind in KINDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def accuracy(classifier: Classifier, images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Shares of the images in which each of KINDS, and both colours together, are what the scene says."""
    named, truth = classifier.name(images), labels_of(scenes)
    right = {kind: named[kind] == truth[kind] for kind in KINDS}
    right["colours"] = right["colour"] & right["background"]
    return {kind: share.float().mean().item() for kind, share in right.items()}


def generate(pipe: DiffusionPipeline, scenes: list[Scene], steps: int, guidance: float) -> list[Image.Image]:
    images = []
    for k in tqdm(range(0, len(scenes), COLUMNS), desc="generating"):
        part = scenes[k : k + COLUMNS]
        generators = [torch.Generator().manual_seed(k + j) for j in range(len(part))]
        images += pipe(
            [scene.caption for scene in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
        ).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_dir", default=MINIATURE, help="a miniature's name, or the pipeline folder to measure")
    parser.add_argument("--results_file", type=Path, help="where the figures go besides --output_dir")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--judge_steps", type=int, default=1200)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results_file = args.results_file or RESULTS.get(miniature_name(args.model_dir))
    if results_file is not None:
        results_file.parent.mkdir(parents=True, exist_ok=True)

    pipe = open_pipeline(args.model_dir)
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier(args.judge_steps)
    renders = [single_shape("judge/test", k) for k in range(2000)]
    own = accuracy(classifier, [scene.render().image for scene in renders], renders)
    scenes = [single_shape("evaluation", k, held_out_pairs()) for k in range(args.images)]
    images = generate(pipe, scenes, args.num_inference_steps, args.guidance_scale)
    generated = accuracy(classifier, images, scenes)

    rows = [("", images[k : k + COLUMNS]) for k in range(0, len(images), COLUMNS)]
    image_grid(rows).save(args.output_dir / "images.png")
    report = {
        "weights_sha256": checksum(Path(base_path(args.model_dir))),
        "pictures": args.images,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "judge_on_held_out_renders": own,
        "painted_for_unseen_combinations": generated,
    }
    for path in (args.output_dir / "report.json", *([results_file] if results_file else [])):
        replace_file(path, (json.dumps(report, indent=2) + "\n").encode())
    print(f"weights {report['weights_sha256'][:16]}, {args.images} images of unseen combinations")
    print(f"{'':12}{'judge on renders':>18}{'generated':>10}")
    for kind in generated:
        print(f"{kind:12}{own[kind]:>18.1%}{generated[kind]:>10.1%}")
    print(args.output_dir / "images.png")


if __name__ == "__main__":
    main()
