"""The DreamBooth evaluation: a method learns each subject and generates it for 25 prompts; how like is it?

    python benchmarks/dreambooth_eval.py --output_dir out/eval --data_dir dreambooth --resolution 512 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --max_train_steps 2000
    python benchmarks/dreambooth_eval.py --output_dir out/quick-eval --quick

Each subject, a folder of photographs in --data_dir, is learned by train_dreambooth_ether.py from all photographs of it
and generated four times for each prompt. Measured: DINO, DINOv2 and CLIP-I (similarity to the photographs), CLIP-T
(similarity to the prompt without the identifier), LPIPS between the images of a prompt (diversity), and drift: how
far images for prompts without the subject have moved from the base model's of the same seeds, by --image_model.
Without --data_dir the subjects and prompts are of the miniature's world. docs/metrics.md has the formulas.

Several processes share the work: start each with the same flags and its own --shard, such as 0/2 and 1/2. A call that
was stopped goes on where it was. Written: adapters, images, a sheet of them and a file of figures for each subject,
and, when all subjects are done, dreambooth_eval.json with all of them.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from PIL import Image
from result_file import ResultFile, write_json
from subjects import PROMPTS_WITHOUT, Subject, add_base, base_settings, drawn, generate, learn, photographed

from ether_diffusion import metrics
from ether_diffusion.base_models import miniature_name, open_pipeline
from ether_diffusion.commands.quickstart import OTHER_PROMPTS, SETTINGS
from ether_diffusion.errors import InputError
from ether_diffusion.evaluation.features import MINIATURE, load_features
from ether_diffusion.files import replace_file
from ether_diffusion.images import find_images, image_grid, read_image
from ether_diffusion.metrics.similarity import CLIP, DINO, DINOV2, LPIPS_NETS
from ether_diffusion.training.data.views import center_cut
from ether_diffusion.training.methods.saving import load_trained
from ether_diffusion.training.options import DEFAULT_METHOD, LEARNING_RATES, METHODS, ValidationOptions

IDENTIFIER = "sks"
FIGURES = {
    "dino": "DINO", "dinov2": "DINOv2", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "lpips": "LPIPS", "drift": "drift",
}  # fmt: skip
QUICK = {"max_train_steps": 3, "num_inference_steps": 2, "subjects": 2, "prompts": 2, "images": 2}

# The dataset's 30 subjects: folder, class word. Source: prompts_and_classes.txt of github.com/google/dreambooth.
CLASSES = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "stuffed animal", "berry_bowl": "bowl",
    "can": "can", "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful_sneaker": "sneaker",
    "dog": "dog", "dog2": "dog", "dog3": "dog", "dog5": "dog", "dog6": "dog", "dog7": "dog", "dog8": "dog",
    "duck_toy": "toy", "fancy_boot": "boot", "grey_sloth_plushie": "stuffed animal", "monster_toy": "toy",
    "pink_sunglasses": "glasses", "poop_emoji": "toy", "rc_car": "toy", "red_cartoon": "cartoon", "robot_toy": "toy",
    "shiny_sneaker": "sneaker", "teapot": "teapot", "vase": "vase", "wolf_plushie": "stuffed animal",
}  # fmt: skip
LIVE = ("cat", "dog")

# The prompts of the same file.
ANY_PLACE = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
ANY_LOOK = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECT_PROMPTS = (
    *ANY_PLACE,
    "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *ANY_LOOK,
)  # fmt: skip
LIVE_PROMPTS = (
    *ANY_PLACE,
    "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *ANY_LOOK,
)  # fmt: skip
MINIATURE_PROMPTS = tuple(
    f"a photo of {{}} {setting}"
    for setting in (*SETTINGS, "on a yellow background", "on a gray background", "on a striped pink background")
)


@dataclass(frozen=True)
class Extractors:
    """What measures. A figure whose extractor is missing is None, for the reason in `missing`."""

    dino: metrics.ImageFeatures | None
    dinov2: metrics.ImageFeatures | None
    clip: metrics.TextImageFeatures
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    missing: dict[str, str]

    @classmethod
    def load(cls, args: argparse.Namespace) -> Extractors:
        extractors: dict[str, Any] = {"clip": load_features(args.image_model, device=args.device)}
        if not hasattr(extractors["clip"], "embed_texts"):
            raise SystemExit(f"error: --image_model {args.image_model}: has no text tower, needs a CLIP")
        missing = {}
        for name in ("dino", "dinov2"):
            model = getattr(args, f"{name}_model")
            extractors[name] = None if model == "none" else load_features(model, device=args.device)
            if model == "none":
                missing[name] = f"--{name}_model none"
        try:
            extractors["lpips"] = metrics.Lpips(args.lpips, device=args.device)
        except (ImportError, OSError) as error:  # not installed, or no network for its weights
            extractors["lpips"], missing["lpips"] = None, str(error)
        return cls(**extractors, missing=missing)


class Evaluation:
    """One subject at a time: learn, generate, measure. All that is finished is kept in the output folder."""

    def __init__(self, args: argparse.Namespace, prompts_without: Sequence[str]):
        self.args, self.folder, self.prompts_without = args, args.output_dir, prompts_without
        self.extractors = Extractors.load(args)

    def run(self, subject: Subject, templates: Sequence[str]) -> dict[str, Any]:
        adapter = self.learn(subject)
        texts = [template.format(f"{IDENTIFIER} {subject.class_name}") for template in templates]
        folder = self.folder / "pictures" / subject.name
        before = sum(self.generate(self.base, self.folder / "pictures" / "base", self.prompts_without, 1), [])
        tuned = functools.cache(lambda: load_trained(self.args.pretrained_model_name_or_path, adapter))
        groups = self.generate(tuned, folder / "subject", texts, self.args.images)
        others = sum(self.generate(tuned, folder / "without", self.prompts_without, 1), [])
        images = sum(groups, [])
        references = [center_cut(read_image(path), images[0].size) for path in find_images(subject.folder)]
        without = [text.replace(f"{IDENTIFIER} ", "") for text in texts for _ in range(self.args.images)]
        rows = [("learned from", references), *zip(texts, groups, strict=True)]
        rows += [("base: without the subject", before), ("tuned: without the subject", others)]
        image_grid(rows).save(folder / "sheet.png")
        extractors = self.extractors
        return {
            "dino": extractors.dino and metrics.image_similarity(images, references, extractors.dino),
            "dinov2": extractors.dinov2 and metrics.image_similarity(images, references, extractors.dinov2),
            "clip_i": metrics.image_similarity(images, references, extractors.clip),
            "clip_t": metrics.text_similarity(images, without, extractors.clip),
            "lpips": extractors.lpips and metrics.diversity(groups, distance=extractors.lpips),
            "drift": metrics.drift(others, before, extractors.clip),
            "missing": extractors.missing,
        }

    def base(self) -> DiffusionPipeline:
        return open_pipeline(self.args.pretrained_model_name_or_path)

    def learn(self, subject: Subject) -> Path:
        """The folder of the subject's adapter, which is there whole or not at all."""
        args, folder = self.args, self.folder / "adapters" / subject.name
        if folder.exists():
            return folder
        partial = folder.with_name(f"{subject.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a training that was stopped
        own = ("pretrained_model_name_or_path", "method", "learning_rate", "max_train_steps", "seed")
        flags = {name: getattr(args, name) for name in own}
        if args.resolution:
            flags["resolution"] = args.resolution
        words = []
        if args.with_prior_preservation:
            flags |= {
                "class_prompt": f"a photo of a {subject.class_name}",
                "class_data_dir": self.folder / "class_images" / subject.name,  # no two processes write into one
                "num_class_images": args.num_class_images,
            }
            words = ["--with_prior_preservation"]
        learn(subject.folder, subject.prompt, partial, flags, words)
        partial.rename(folder)
        return folder

    def generate(
        self, load: Callable[[], DiffusionPipeline], folder: Path, prompts: Sequence[str], count: int
    ) -> list[list[Image.Image]]:
        """`count` images of each prompt; a prompt whose images are all in the folder is not generated again."""
        folder.mkdir(parents=True, exist_ok=True)
        options = ValidationOptions(
            num_validation_images=count,
            num_inference_steps=self.args.num_inference_steps,
            guidance_scale=self.args.guidance_scale,
        )
        groups, pipe = [], None
        for k, prompt in enumerate(prompts):
            paths = [folder / f"{k:02}_{j}.png" for j in range(count)]
            if not all(path.exists() for path in paths):
                pipe = pipe or load().to(self.args.device)
                for path, image in zip(paths, generate(pipe, prompt, options, self.args.seed), strict=True):
                    content = io.BytesIO()
                    image.save(content, format="PNG")
                    replace_file(path, content.getvalue())  # every process generates the base's: the same images
            groups.append([read_image(path) for path in paths])
        return groups


def choose_subjects(args: argparse.Namespace) -> list[tuple[Subject, Sequence[str]]]:
    """Subjects, each with the templates of its prompts.

    Raises:
        SystemExit: --classes without the class of a folder, or of another form.
    """
    if args.data_dir is None:
        return [(each, MINIATURE_PROMPTS) for each in drawn(args.subjects or 9, args.output_dir / "views")]
    known = {name: {"class": word, "live": word in LIVE} for name, word in CLASSES.items()}
    if args.classes:
        given = json.loads(args.classes.read_text())
        for name, entry in given.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
                raise SystemExit(
                    f'error: --classes {args.classes}: {name} is {entry}, needs {{"class": "dog", "live": true}}'
                )
        known |= given
    chosen = []
    for subject in photographed(args.data_dir)[: args.subjects]:
        entry = known.get(subject.name, {"class": subject.class_name})
        prompts = LIVE_PROMPTS if entry.get("live", entry["class"] in LIVE) else OBJECT_PROMPTS
        chosen.append((replace(subject, class_name=entry["class"]), prompts))
    return chosen


def check_settings(path: Path, settings: dict[str, Any], subjects: dict[str, Any]) -> None:
    """Write what adapters and images in the folder are made with, before the first of them.

    Raises:
        SystemExit: the folder holds those of other settings, or of a subject with another class or other prompts.
    """
    wanted = json.loads(json.dumps({"settings": settings, "subjects": subjects}))
    if path.exists():
        held = json.loads(path.read_text())
        other = [name for name, value in wanted["settings"].items() if held["settings"].get(name) != value]
        other += [name for name, value in wanted["subjects"].items() if held["subjects"].get(name, value) != value]
        if other:
            what = ", ".join(other)
            raise SystemExit(f"error: {path.parent}: was begun with another {what}; take another --output_dir")
        wanted["subjects"] = held["subjects"] | wanted["subjects"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each subject, and their means."""
    yield f"{'subject':24}" + "".join(f"{title:>9}" for title in FIGURES.values())
    means = {
        name: None if any(row[name] is None for row in rows) else sum(row[name] for row in rows) / len(rows)
        for name in FIGURES
    }
    for row in (*rows, {"subject": "mean", **means}):
        figures = ("–" if row[name] is None else f"{row[name]:.3f}" for name in FIGURES)
        yield f"{row['subject']:24}" + "".join(f"{figure:>9}" for figure in figures)


def read_shard(word: str) -> tuple[int, int]:
    index, slash, count = word.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"got {word!r}, needs INDEX/COUNT such as 0/2, the index below the count")
    return int(index), int(count)


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, help="one folder of photographs for each subject")
    parser.add_argument("--classes", type=Path, help='JSON: {folder: {"class": "dog", "live": true}}')
    add_base(parser)
    parser.add_argument("--method", choices=METHODS, default=DEFAULT_METHOD)
    parser.add_argument("--learning_rate", type=float, help="default: the method's own")
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--num_class_images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--subjects", type=int, help="only so many")
    parser.add_argument("--prompts", type=int, help="only the first so many")
    parser.add_argument("--images", type=int, default=4, help="of each prompt")
    parser.add_argument("--image_model", help=f"a CLIP; default: {CLIP}, the miniature's own on its subjects")
    parser.add_argument("--dino_model", help=f"default: {DINO}, none on the miniature's subjects")
    parser.add_argument("--dinov2_model", help=f"default: {DINOV2}, none on the miniature's subjects")
    parser.add_argument("--lpips", choices=LPIPS_NETS, default="alex", help="network of LPIPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shard", type=read_shard, default=(0, 1), metavar="INDEX/COUNT", help="every COUNT-th subject"
    )
    parser.add_argument("--quick", action="store_true", help="a look at every part in less than a minute")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("started as one of several processes of a launcher; start each with python and its own --shard")
    if args.quick:
        vars(args).update(QUICK)
    if args.images < 2:
        parser.error(f"--images: got {args.images}, needs two: diversity is between images of one prompt")
    own = args.data_dir is None
    args.image_model = args.image_model or (MINIATURE if own else CLIP)
    args.dino_model = args.dino_model or ("none" if own else DINO)
    args.dinov2_model = args.dinov2_model or ("none" if own else DINOV2)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.method]
    return args


def main() -> None:
    args = read_arguments()
    try:
        chosen = choose_subjects(args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    shared = (
        "method", "learning_rate", "max_train_steps", "resolution", "with_prior_preservation", "num_class_images",
        "seed", "num_inference_steps", "guidance_scale", "images", "prompts", "image_model", "dino_model",
        "dinov2_model", "lpips",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in shared}
    model = args.pretrained_model_name_or_path
    settings |= {"model": miniature_name(model) or model, **base_settings(model)}
    check_settings(
        args.output_dir / "settings.json",
        settings | {"data_dir": args.data_dir and str(args.data_dir.resolve())},
        {subject.name: [subject.class_name, list(templates)] for subject, templates in chosen},
    )
    files = [
        ResultFile(args.output_dir / "rows" / f"{subject.name}.json", settings, machine=machine())
        for subject, _ in chosen
    ]  # a file for each subject: processes do not write into one
    index, count = args.shard
    evaluation = None
    for (subject, templates), file in list(zip(chosen, files, strict=True))[index::count]:
        if not file.rows:
            evaluation = evaluation or Evaluation(args, OTHER_PROMPTS if args.data_dir is None else PROMPTS_WITHOUT)
            figures = evaluation.run(subject, templates[: args.prompts])
            file.add({"subject": subject.name, "class": subject.class_name, **figures})
            print(args.output_dir / "pictures" / subject.name / "sheet.png", flush=True)
    files = [ResultFile(file.path, settings) for file in files]  # with what other processes wrote meanwhile
    rows = [row for file in files for row in file.rows]
    if rows:
        print("\n".join(table(rows)))
    if len(rows) < len(chosen):
        print(f"{len(rows)} of {len(chosen)} subjects are done")
        return
    write_json(args.output_dir / "dreambooth_eval.json", {**settings, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
