"""PEFT's benchmark of image generation: a method learns a cat from 14 images; how like it is the cat, what else moved?

    python benchmarks/peft_image_benchmark.py --output_dir out/peft-image             # the rows of ETHER, on a GPU
    python benchmarks/peft_image_benchmark.py --output_dir out/peft-image \\
        --experiments lora/flux2-klein-default peft/method_comparison/image-gen/experiments/boft/flux2-klein-default

An experiment is a folder with an adapter_config.json that PEFT reads and, where it differs from the benchmark's, a
training_params.json; those of benchmarks/peft_image_gen/experiments go by their names. Each is trained in the
setting of PEFT's method_comparison/image-gen on FLUX.2 klein-base 4B, and measured: parameters, file size, DINOv2
similarity, drift, peak of the reserved memory and seconds. Model, data and DINOv2 come from the Hub, or from folders.

Rows go to peft_image_gen.json in --output_dir, adapters and test images beside it; what is there is not run again.
The table has PEFT's published rows around them, where the setting is theirs. docs/peft-image-benchmark.md has the
details, and what one seed and twelve images cannot tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import machine, make_parser
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft_image_gen.data import Example, read_data_set, read_folder, split
from peft_image_gen.evaluation import drift, similarity
from peft_image_gen.model import BenchmarkKlein, Prepared, open_model, prepare
from peft_image_gen.settings import DATA, DINO, MODEL, TEXT_LAYERS, Experiment, Setting, read_experiment
from peft_image_gen.training import train
from result_file import ResultFile

from ether_diffusion.errors import InputError
from ether_diffusion.images import image_grid
from ether_diffusion.metrics import ImageFeatures, load_features
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.memory import format_bytes

PUBLISHED = Path(__file__).parent / "peft_image_gen" / "published.json"
ETHERS = [f"{name}/flux2-klein-default" for name in ("ether", "ether_plus", "ether_plus_one_sided")]
QUICK = {"resolution": 32, "num_inference_steps": 2, "repeats": 1}
QUICK_STEPS, QUICK_PROMPTS = 2, 2


class Benchmark:
    """One experiment after the other on one model: train, save, measure."""

    def __init__(self, family: BenchmarkKlein, features: ImageFeatures, examples: Sequence[Example], folder: Path):
        self.family, self.features, self.folder = family, features, folder
        self.trained, self.tested = split(examples)
        self._prepared: Prepared | None = None

    def run(self, experiment: Experiment) -> dict[str, Any]:
        """The row of an experiment; its adapter and its test images are written to the folder."""
        if self._prepared is None:
            self._prepared = prepare(self.family, self.trained, self.tested)
        trained = train(self.family, self._prepared, experiment)
        started = time.perf_counter()
        trained.model.eval()
        alike, images = similarity(self.family, self.tested, self.features)
        moved = drift(self.family, trained.model, self.features)
        generating = time.perf_counter() - started
        saved = self._save(experiment, trained.model)
        self._draw(experiment, images)
        training = experiment.training
        return {
            "peft_type": str(experiment.config.peft_type.value),
            "learning_rate": training.optimizer_kwargs["lr"],
            "training": training.model_dump(mode="json"),
            "parameters": trained.parameters,
            "file_bytes": saved,
            "similarity": alike,
            "drift": moved,
            "peak_bytes": trained.peak_bytes,
            "step_seconds": trained.seconds,
            # What the published figure covers: encoding, steps, and the images of both measurements.
            "seconds": self._prepared.seconds + trained.seconds + generating,
            "loss": trained.loss,
        }

    def _save(self, experiment: Experiment, model: Any) -> int:
        folder = self.folder / "adapters" / experiment.name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        return (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size

    def _draw(self, experiment: Experiment, images: Sequence[Any]) -> None:
        sheet = self.folder / "images" / f"{experiment.name.replace('/', '--')}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        count = len(self.tested)
        rows = [(each.prompt, [each.image, *images[k::count]]) for k, each in enumerate(self.tested)]
        image_grid(rows).save(sheet)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Ours and the published ones, the most similar first."""
    yield f"{'':34}{'parameters':>14}{'file':>11}{'DINOv2':>9}{'drift':>8}{'memory':>11}{'seconds':>9}"
    for row in sorted(rows, key=lambda row: -row["similarity"]):
        name = row["title"] if "title" in row else f"{row['experiment']}  <"
        file, moved = row["file_bytes"], row["drift"]
        yield (
            f"{name:34}{row['parameters']:14,}{'–' if file is None else format_bytes(file):>11}"
            f"{row['similarity']:9.3f}{'–' if moved is None else format(moved, '.3f'):>8}"
            f"{format_bytes(row['peak_bytes']):>11}{row['seconds']:9.0f}"
        )


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--experiments", nargs="+", default=ETHERS, help="names or folders; default: those of ETHER")
    parser.add_argument(
        "--pretrained_model_name_or_path", "--model", default=MODEL, help=f"id or folder; default: {MODEL}"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--dataset_name", default=DATA, help=f"id or folder, for `datasets`; default: {DATA}")
    data.add_argument("--data_dir", type=Path, help="in its place, a folder of images")
    parser.add_argument("--dinov2", default=DINO, help=f"id or folder; default: {DINO}")
    parser.add_argument(
        "--text_layers",
        choices=TEXT_LAYERS,
        default="benchmark",
        help="layers of the text encoder: 10, 20, 30 as in the published rows, or the pipeline's own 9, 18, 27",
    )
    parser.add_argument("--max_train_steps", type=int, help="in place of each experiment's own")
    parser.add_argument("--resolution", type=int, default=Setting.resolution)
    parser.add_argument("--num_inference_steps", type=int, default=Setting.num_inference_steps)
    parser.add_argument("--repeats", type=int, default=Setting.repeats, help="images of each test prompt")
    parser.add_argument("--seed", type=int, default=Setting.seed)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default=Setting.dtype, help="of the base"
    )
    parser.add_argument("--label", help="a remark on the rows, kept with them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a look at every part, for models of small size")
    args = parser.parse_args()
    for name in ("max_train_steps", "resolution", "num_inference_steps", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, needs at least 1")
    if args.quick:
        vars(args).update(QUICK, max_train_steps=QUICK_STEPS)
    return args


def read_setting(args: argparse.Namespace) -> Setting:
    given = {name: getattr(args, name) for name in ("dtype", "resolution", "num_inference_steps", "repeats", "seed")}
    setting = Setting(**given, text_layers=TEXT_LAYERS[args.text_layers])
    if args.quick:
        return dataclasses.replace(setting, drift_prompts=setting.drift_prompts[:QUICK_PROMPTS])
    return setting


def read_experiments(args: argparse.Namespace) -> list[Experiment]:
    experiments = [read_experiment(place) for place in args.experiments]
    names = [each.name for each in experiments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--experiments: {twice[0]} is there twice; a row goes by the names of its last two folders")
    if args.max_train_steps is None:
        return experiments
    update = {"max_steps": args.max_train_steps}
    return [dataclasses.replace(each, training=each.training.model_copy(update=update)) for each in experiments]


def read_features(args: argparse.Namespace) -> ImageFeatures:
    try:
        return load_features(args.dinov2, device=args.device)
    except (OSError, ValueError) as error:
        raise InputError(f"--dinov2 {args.dinov2}: cannot be loaded ({error})") from error


def settings_of(args: argparse.Namespace, setting: Setting, source: ModelSource, count: int) -> dict[str, Any]:
    """What rows have to have in common to stand in one file."""
    places = {"data": args.data_dir or args.dataset_name, "dinov2": args.dinov2}
    # Of a folder, where it lies is nobody's business.
    words = {name: Path(each).resolve().name if Path(each).exists() else each for name, each in places.items()}
    words = {"model": source.name, **words, "data_images": count}
    if args.label:
        words = {"label": args.label, **words}
    return words | {"max_train_steps": args.max_train_steps} | dataclasses.asdict(setting)


def is_published(settings: Mapping[str, Any], setting: Setting) -> bool:
    """Whether rows of these settings may stand beside the published ones."""
    named = [(settings["model"], MODEL), (settings["data"], DATA), (settings["dinov2"], DINO)]
    same = all(name.rpartition("/")[2] == theirs.rpartition("/")[2] for name, theirs in named)
    return same and setting == Setting() and settings["max_train_steps"] is None


def run(args: argparse.Namespace) -> list[Mapping[str, Any]]:
    """Rows of all experiments, those that are in the file already not run again; and the published ones beside them.

    Raises:
        InputError: something of what was given cannot be used; found before the first training.
    """
    setting, experiments = read_setting(args), read_experiments(args)
    examples = read_data_set(args.dataset_name) if args.data_dir is None else read_folder(args.data_dir)
    source = ModelSource(args.pretrained_model_name_or_path)
    settings = settings_of(args, setting, source, len(examples))
    split(examples)
    family = open_model(source, setting, args.device)
    # Before the model, as there: its weights are in the published memory, too.
    features = read_features(args)
    counted = "reserved by CUDA's allocator" if family.device.type == "cuda" else "tensors alive"
    described = {"machine": machine(), "memory": counted}
    file = ResultFile(args.output_dir / "peft_image_gen.json", settings, **described)
    benchmark = Benchmark(family, features, examples, args.output_dir)
    for experiment in experiments:
        if (row := file.find(experiment=experiment.name)) is None:
            row = file.add({"experiment": experiment.name, **benchmark.run(experiment)})
        elif row["training"] != experiment.training.model_dump(mode="json"):
            raise InputError(
                f"{file.path}: holds a row of {experiment.name} with other parameters; take another --output_dir"
            )
    beside = json.loads(PUBLISHED.read_text("utf-8"))["rows"] if is_published(settings, setting) else []
    return [*file.rows, *beside]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = read_arguments()
    try:
        rows = run(args)
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
