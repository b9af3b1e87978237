"""Every method of --method on the same subjects: what it learns, what the model forgets, what it costs.

    python benchmarks/compare_methods.py --output_dir out/methods --data_dir photos_by_subject
    python benchmarks/compare_methods.py --output_dir out/methods --base miniature-dit --subjects 2
    python benchmarks/compare_methods.py --output_dir out/methods --quick

Subjects of the miniature's world are learned from five views, those of --data_dir (one folder of photographs each)
from all photographs but the last, by train_dreambooth_ether.py with each method's own defaults. Measured, beside the
base model: the denoising loss on the image that was held out; the similarity (CLIP-I) of images generated for the
subject's prompt to those it was learned from; the similarity (CLIP-T) to their own text of images generated for
prompts without the subject, which falls as the model forgets. CLIP is the miniature's own: it has never seen a
photograph. Writes JSON row by row (the same command goes on where it was stopped) and a sheet of images for each
subject; prints the means over the miniature's subjects and over the photographed ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from denoising import denoising_loss
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from PIL import Image
from result_file import ResultFile
from subjects import MINIATURE, PHOTOGRAPHS, Subject, base_settings, drawn, generate, learn, photographed, squares
from trials import BASE, Variant

from ether_diffusion.base_models import MINIATURES, open_pipeline
from ether_diffusion.commands.quickstart import OTHER_PROMPTS
from ether_diffusion.images import image_grid, read_image
from ether_diffusion.metrics import image_similarity, text_similarity
from ether_diffusion.miniature import ClipScore
from ether_diffusion.training.methods.configs import KNOWN
from ether_diffusion.training.methods.saving import load_trained
from ether_diffusion.training.options import DEFAULT_STEPS, LEARNING_RATES, METHODS, ValidationOptions

SIDE = 64  # of the miniature's images, in pixels
SEEDS, GUIDANCE = 4, 5.0
QUICK = {"method": ("ether_plus", "lora"), "subjects": 1, "max_train_steps": 3, "num_inference_steps": 2}


class Comparison:
    """One method on one subject at a time.

    Args:
        steps: of the training.
        seed: of the training and of the first image of each prompt.
        num_inference_steps: of every image.
        images_dir: where the images of the subject's prompt go, in a folder for each subject and method.
        base: the miniature's name.
    """

    def __init__(self, *, steps: int, seed: int, num_inference_steps: int, images_dir: Path, base: str = MINIATURE):
        self.steps, self.seed, self.images_dir = steps, seed, images_dir
        self.num_inference_steps, self.model = num_inference_steps, MINIATURES[base]
        self.clip = ClipScore()

    def base(self, subject: Subject) -> dict[str, float]:
        """The figures of the model as it is."""
        return self._measure(open_pipeline(self.model), subject, BASE)

    def tuned(self, subject: Subject, method: str, rate: float) -> dict[str, float]:
        """The figures after the training, and the seconds that it took."""
        with tempfile.TemporaryDirectory() as folder:
            seen, output_dir = subject.copy_seen(Path(folder, "seen")), Path(folder, "result")
            flags = {
                "pretrained_model_name_or_path": self.model,
                "method": method,
                "learning_rate": rate,
                "max_train_steps": self.steps,
                "seed": self.seed,
            }
            result = learn(seen, subject.prompt, output_dir, flags)
            pipe = load_trained(self.model, output_dir)
            return {"seconds": result.seconds, **self._measure(pipe, subject, method)}

    def _measure(self, pipe: DiffusionPipeline, subject: Subject, method: str) -> dict[str, float]:
        own = self._generate(pipe, subject.prompt, SEEDS)
        folder = image_folder(self.images_dir, subject, method)
        folder.mkdir(parents=True, exist_ok=True)
        for k, image in enumerate(own):
            image.save(folder / f"{k}.png")
        others = [self._generate(pipe, prompt, 1)[0] for prompt in OTHER_PROMPTS]
        return {
            "held_out": denoising_loss(pipe, read_image(subject.held_out), subject.prompt, seed=self.seed),
            "clip_i": image_similarity(own, squares(subject, (SIDE, SIDE)), self.clip),
            "clip_t": text_similarity(others, OTHER_PROMPTS, self.clip),
        }

    def _generate(self, pipe: DiffusionPipeline, prompt: str, count: int) -> list[Image.Image]:
        options = ValidationOptions(
            num_validation_images=count, num_inference_steps=self.num_inference_steps, guidance_scale=GUIDANCE
        )
        return generate(pipe, prompt, options, self.seed)


def image_folder(images_dir: Path, subject: Subject, method: str) -> Path:
    return images_dir / subject.origin / subject.name / method


def draw_sheet(subject: Subject, methods: Sequence[str], images_dir: Path) -> Path:
    """Rows of the same seeds: what was learned from, the base model, each method."""
    rows = [(f"{subject.name}: learned from", squares(subject, (SIDE, SIDE)))]
    for name in (BASE, *methods):
        folder = image_folder(images_dir, subject, name)
        rows.append((KNOWN.get(name, (name,))[0], [read_image(folder / f"{k}.png") for k in range(SEEDS)]))
    path = images_dir / f"{subject.origin}_{subject.name}.png"
    image_grid(rows).save(path)
    return path


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """Lines with the means over the subjects, for each origin."""
    for origin in (MINIATURE, PHOTOGRAPHS):
        own = [row for row in rows if row["origin"] == origin]
        if not own:
            continue
        count = len({row["subject"] for row in own})
        yield ""
        title = f"{origin}, {count} subject{'s' * (count > 1)}"
        yield (f"{title:26}{'parameters':>11}{'rate':>8}{'held out':>10}{'CLIP-I':>8}{'CLIP-T':>8}{'training':>10}")
        for name in names:
            held = [row for row in own if row["method"] == name]
            figures = {
                key: sum(row[key] for row in held) / len(held) for key in ("held_out", "clip_i", "clip_t", "seconds")
            }
            rate = "" if name == BASE else f"{held[0]['learning_rate']:.0e}"
            yield (
                f"{KNOWN.get(name, (name,))[0]:26}{held[0]['parameters']:>11,}{rate:>8}{figures['held_out']:>10.4f}"
                f"{figures['clip_i']:>8.3f}{figures['clip_t']:>8.3f}{figures['seconds']:>8.0f} s"
            )


def read_rates(words: Sequence[str]) -> dict[str, float]:
    """The learning rates, those given as METHOD=RATE in place of the defaults.

    Raises:
        ValueError: a word of another form.
    """
    rates = dict(LEARNING_RATES)
    for word in words:
        method, equals, rate = word.partition("=")
        if method not in METHODS or not equals:
            raise ValueError(f"--learning_rate: got {word!r}, needs METHOD=RATE with one of {', '.join(METHODS)}")
        rates[method] = float(rate)
    return rates


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--base", choices=list(MINIATURES), default=MINIATURE)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--learning_rate", nargs="+", default=[], metavar="METHOD=RATE")
    parser.add_argument("--max_train_steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--subjects", type=int, default=9, help="how many of the miniature's world")
    parser.add_argument("--data_dir", type=Path, help="one folder of photographs for each subject")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a look at every part in less than a minute")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    try:
        rates = read_rates(args.learning_rate)
    except ValueError as error:
        parser.error(str(error))
    chosen = [] if args.data_dir is None else photographed(args.data_dir)
    chosen = [*drawn(args.subjects, args.output_dir / "views"), *chosen]

    shared = {"seed": args.seed, "num_inference_steps": args.num_inference_steps}
    settings = {**base_settings(args.base), **shared}
    if args.base != MINIATURE:  # which files of before there were two do not name
        settings["model"] = args.base
    results = ResultFile(args.output_dir / "compare_methods.json", settings, machine=machine())
    comparison = Comparison(
        steps=args.max_train_steps, images_dir=args.output_dir / "pictures", base=args.base, **shared
    )
    parameters = {method: Variant.of(method).parameters(args.base) for method in args.method}
    rows = []
    for subject in chosen:
        which = {"subject": subject.name, "origin": subject.origin}
        for method in (BASE, *args.method):
            key = {**which, "method": method, "learning_rate": None, "steps": 0}
            if method != BASE:
                key |= {"learning_rate": rates[method], "steps": args.max_train_steps}
            row = results.find(**key)
            if row is None and method == BASE:
                row = results.add({**key, "parameters": 0, "seconds": 0.0, **comparison.base(subject)})
            elif row is None:
                figures = comparison.tuned(subject, method, rates[method])
                row = results.add({**key, "parameters": parameters[method], **figures})
            rows.append(row)
        print(draw_sheet(subject, args.method, args.output_dir / "pictures"), flush=True)
    print("\n".join(table(rows, (BASE, *args.method))))


if __name__ == "__main__":
    main()
