"""How far can a method move the weights, and what is left of the images there? Random transforms, no training.

    python benchmarks/bounded_distance.py --output_dir out/bounded_distance
    python benchmarks/bounded_distance.py --output_dir out/quick --quick

Every attention layer of the denoiser gets a random transform of growing strength. Strength is: of ETHER
the number of blocks (a reflection has no strength); of ETHER+ the angle between û and v̂; of LoRA the standard
deviation of B (A is as at the start of training); of OFT that of the skew-symmetric matrices; of HRA that of what is
added to its unit vectors at the start of training; of noise that of what is added to the weight, in units of the
weight's own. Measured, as means over the layers: ‖W' − W‖_F / ‖W‖_F, and ‖T − I‖_F where the method is a transform;
and of the images: drift, 1 − cosine to the base's images of the same seeds in CLIP, and similarity to
their prompts (CLIP-T).
Writes JSON row by row (the same command goes on where it was stopped) and a strip of images (above each row its
strengths and relative distances), and prints a table.

This is the perturbation study of the ETHER paper, arXiv:2405.20271, by default on the miniature; --base miniature-dit
takes the transformer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from peft import HRAConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from result_file import ResultFile
from strips import strip
from subjects import MINIATURE, PROMPTS_WITHOUT, add_base, base_settings
from torch import Generator, Tensor, nn
from trials import BASE, GUIDANCE, denoiser, finite, is_target

from ether_diffusion import EtherConfig
from ether_diffusion.analysis.weights import adapted_weights, transform_distance, transform_of
from ether_diffusion.base_models import miniature_name, open_pipeline
from ether_diffusion.commands.quickstart import OTHER_PROMPTS
from ether_diffusion.evaluation.features import load_features
from ether_diffusion.metrics import TextImageFeatures, drift, text_similarity
from ether_diffusion.metrics.similarity import CLIP
from ether_diffusion.training.families import family_of
from ether_diffusion.training.seeds import generator
from ether_diffusion.tuner.layer import EtherLayer

ADAPTER = "default"
SHOWN_PROMPT = 2  # in the strip
DECADES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
ANGLES = (1.0, 3.0, 10.0, 30.0, 60.0, 90.0)
BLOCKS = (1, 2, 4, 8, 16, 32)
QUICK = {"seeds": 1, "num_inference_steps": 2, "strengths": 2}


@dataclass(frozen=True)
class Perturbation:
    """A method with the strengths to try.

    config: of a strength, without the layers; None where the weights themselves are changed.
    draw: sets what one layer has at random, at a strength.
    label: of a strength, for `str.format`.
    """

    name: str
    strengths: Sequence[float]
    label: str
    config: Callable[[float], PeftConfig | None]
    draw: Callable[[nn.Module, float, Generator], None]


def normal(like: Tensor, numbers: Generator) -> Tensor:
    """Of a tensor's shape and on its device, from a generator of the CPU: the same numbers everywhere."""
    return torch.randn(like.shape, generator=numbers).to(like)


def keep(layer: EtherLayer, strength: float, numbers: Generator) -> None:
    """ETHER is a random reflection from the start."""


def turn(layer: EtherLayer, degrees: float, numbers: Generator) -> None:
    """v̂ at an angle to û, in a random direction: −(û cos θ + ŵ sin θ) with a random ŵ at right angles to û."""
    angle = math.radians(degrees)
    for us, vs in ((layer.ether_u, layer.ether_v), (layer.ether_u_out, layer.ether_v_out)):
        if ADAPTER in us:
            u = nn.functional.normalize(us[ADAPTER], dim=-1)
            w = normal(u, numbers)
            w = nn.functional.normalize(w - (w * u).sum(-1, keepdim=True) * u, dim=-1)
            vs[ADAPTER].copy_(-(u * math.cos(angle) + w * math.sin(angle)))


def spread(layer: nn.Module, deviation: float, numbers: Generator) -> None:
    """LoRA's B, or the skew-symmetric matrices of OFT."""
    weight = (layer.lora_B if hasattr(layer, "lora_B") else layer.oft_R)[ADAPTER].weight
    weight.copy_(deviation * normal(weight, numbers))


def spread_vectors(layer: nn.Module, deviation: float, numbers: Generator) -> None:
    u = nn.functional.normalize(layer.hra_u[ADAPTER], dim=0)
    layer.hra_u[ADAPTER].copy_(u + deviation * normal(u, numbers) / math.sqrt(len(u)))


def spread_weight(layer: nn.Linear, deviation: float, numbers: Generator) -> None:
    size = layer.weight.square().mean().sqrt()
    layer.weight.add_(deviation * size * normal(layer.weight, numbers))


STUDIED = (
    Perturbation("ETHER", BLOCKS, "n={:g}", lambda n: EtherConfig(num_blocks=int(n)), keep),
    Perturbation("ETHER+ one side", ANGLES, "{:g}°", lambda _: EtherConfig(method="ether_plus", sides="input"), turn),
    Perturbation("ETHER+", ANGLES, "{:g}°", lambda _: EtherConfig(method="ether_plus"), turn),
    Perturbation("HRA r=2", DECADES, "{:g}", lambda _: HRAConfig(r=2), spread_vectors),
    Perturbation(
        "OFT, blocks of 32",
        DECADES,
        "{:g}",
        # The exact Cayley transform: that of PEFT's default is a series, which is orthogonal near 0 alone.
        lambda _: OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=False),
        spread,
    ),
    Perturbation(
        "LoRA r=4",
        DECADES,
        "{:g}",
        lambda _: LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian"),
        spread,
    ),
    Perturbation("noise", DECADES, "{:g}", lambda _: None, spread_weight),
)


@torch.no_grad()
def perturbed(
    model: nn.Module, targets: Sequence[str] | str, perturbation: Perturbation, strength: float, seed: int
) -> tuple[nn.Module, dict]:
    """A copy of the denoiser with random transforms in these layers, and how far they are from the identity."""
    # Of its own seed, since numbers that an adapter has started with must not come again.
    changed, numbers = copy.deepcopy(model), generator(seed, "transforms")
    config = perturbation.config(strength)
    if config is None:
        layers = [layer for name, layer in changed.named_modules() if is_target(targets, name)]
    else:
        config.target_modules = targets if isinstance(targets, str) else set(targets)
        torch.manual_seed(seed)
        changed.add_adapter(config, ADAPTER)
        layers = [layer for layer in changed.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        perturbation.draw(layer, strength, numbers)
    if config is None:
        before, after = dict(model.named_modules()), dict(changed.named_modules())
        pairs = [(before[name].weight, after[name].weight) for name in after if is_target(targets, name)]
    else:
        pairs = [(before, after) for _, before, after in adapted_weights(changed)]
    relative = [((after - before).norm() / before.norm()).item() for before, after in pairs]
    transforms = [distance for layer in layers for distance in transform_distances(layer)]
    return changed, {
        "relative_distance": finite(mean(relative)),
        "transform_distance": finite(mean(transforms)) if transforms else None,
    }


def transform_distances(layer: nn.Module) -> Iterator[float]:
    """‖T − I‖_F of each side of a layer; nothing where the method adds to the weight."""
    if isinstance(layer, EtherLayer):
        for u, v in layer.vectors(ADAPTER).sides():
            yield transform_distance(transform_of(u, v))
    elif hasattr(layer, "hra_u") or hasattr(layer, "oft_R"):
        transform = layer.get_delta_weight(ADAPTER)  # which is T, whatever its name
        yield (transform - torch.eye(len(transform), device=transform.device)).norm().item()


class Sampler:
    """Generates one image for each prompt with a denoiser, and compares them with those of the base."""

    def __init__(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], num_inference_steps: int, features: TextImageFeatures
    ):
        self.pipe, self.prompts, self.num_inference_steps = pipe, list(prompts), num_inference_steps
        self.features, self.base = features, denoiser(pipe)
        pipe.set_progress_bar_config(disable=True)
        self._base_images: dict[int, list[Image.Image]] = {}

    def generate(self, model: nn.Module, seed: int) -> list[Image.Image]:
        setattr(self.pipe, family_of(self.pipe).denoiser, model)
        return self.pipe(
            self.prompts,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=GUIDANCE,
            generator=[Generator().manual_seed(1000 * seed + k) for k in range(len(self.prompts))],
        ).images

    def figures(self, model: nn.Module, seed: int) -> tuple[list[Image.Image], dict[str, float]]:
        if seed not in self._base_images:
            self._base_images[seed] = self.generate(self.base, seed)
        images = self.generate(model, seed)
        return images, {
            "drift": drift(images, self._base_images[seed], self.features),
            "clip_t": text_similarity(images, self.prompts, self.features),
        }


def averages(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the seeds; None where one of them is not finite or there is no such figure."""
    names = ("relative_distance", "transform_distance", "drift", "clip_t")
    columns = {name: [row[name] for row in rows] for name in names}
    return {name: None if None in column else mean(column) for name, column in columns.items()}


def line(name: str, strength: str, figures: dict[str, float | None]) -> str:
    cells = ["–" if value is None else f"{value:.3g}" for value in figures.values()]
    return f"{name:18}{strength:>8}" + "".join(f"{cell:>12}" for cell in cells)


HEAD = f"{'':18}{'strength':>8}{'|ΔW|/|W|':>12}{'|T − I|':>12}{'drift':>12}{'CLIP-T':>12}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the transforms and of the images")
    add_base(parser)
    parser.add_argument("--clip_model", help=f"default: {CLIP}, on the miniature its own")
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a look at every part in less than a minute")
    args = parser.parse_args()
    args.strengths = None
    if args.quick:
        vars(args).update(QUICK)

    model = args.pretrained_model_name_or_path
    settings = {
        "model": model,
        "clip_model": args.clip_model or (MINIATURE if miniature_name(model) else CLIP),
        "num_inference_steps": args.num_inference_steps,
        **base_settings(model),
    }
    results = ResultFile(args.output_dir / "bounded_distance.json", settings, machine=machine())
    images_dir = args.output_dir / "pictures"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = open_pipeline(model).to(device)
    prompts, targets = OTHER_PROMPTS[2:] if miniature_name(model) else PROMPTS_WITHOUT[:4], family_of(pipe).targets
    features = load_features(settings["clip_model"], device=device)
    sampler = Sampler(pipe, prompts, args.num_inference_steps, features)

    def measure(name: str, strength: float, seed: int, changed: nn.Module, moved: dict[str, float | None]) -> dict:
        images, figures = sampler.figures(changed, seed)
        if seed == 0:
            path = image_path(images_dir, name, strength)
            path.parent.mkdir(parents=True, exist_ok=True)
            images[SHOWN_PROMPT].save(path)
        return results.add({"method": name, "strength": strength, "seed": seed, **moved, **figures})

    studied = [(each, strength) for each in STUDIED for strength in each.strengths[: args.strengths]]
    for seed in range(args.seeds):
        if results.find(method=BASE, seed=seed) is None:
            measure(BASE, 0, seed, sampler.base, {"relative_distance": 0.0, "transform_distance": 0.0})
        for perturbation, strength in studied:
            if results.find(method=perturbation.name, strength=strength, seed=seed) is None:
                changed = perturbed(sampler.base, targets, perturbation, strength, seed)
                measure(perturbation.name, strength, seed, *changed)

    def figures_of(**key: Any) -> dict[str, float | None]:
        return averages([results.find(**key, seed=seed) for seed in range(args.seeds)])

    print(f"{HEAD}\n{line(BASE, '', figures_of(method=BASE))}")
    shown = {BASE: [("", image_path(images_dir, BASE, 0))]}
    for perturbation, strength in studied:
        figures, label = figures_of(method=perturbation.name, strength=strength), perturbation.label.format(strength)
        print(line(perturbation.name, label, figures))
        moved = figures["relative_distance"]
        text = label if moved is None else f"{label}: {moved:.2g}"
        shown.setdefault(perturbation.name, []).append((text, image_path(images_dir, perturbation.name, strength)))
    path = args.output_dir / "bounded_distance.png"
    strip(list(shown.items())).save(path)
    print(path)


def image_path(folder: Path, name: str, strength: float) -> Path:
    return folder / name / f"{strength:g}.png"


if __name__ == "__main__":
    main()
