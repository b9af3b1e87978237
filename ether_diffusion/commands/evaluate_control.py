"""Measure control: generate one image for each control image, and let a judge say whether it is what was asked for.

  ether-diffusion evaluate-control --miniature 200 --adapter out/control --output_dir out/control-evaluation
  ether-diffusion evaluate-control --base stable-diffusion-v1-5/stable-diffusion-v1-5 --adapter out/control \\
      --data_dir ade20k/validation --reduce_labels --output_dir out/control-evaluation

--data_dir is a folder with metadata.jsonl: a line for each image with file_name, conditioning_image, text and, if
there is one, labels: an image whose grey values are indices of classes (255 is not counted). Without labels, what
the judge sees in the real image is taken for the truth.

Writes report.json and sheet.png (control image, real image, generated with control, generated without; a column each).
The report's scores of the real images are the judge's own ceiling, those without control the floor.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from peft import PeftModel
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ether_diffusion import metrics, miniature
from ether_diffusion.control.encoder import CONTROL, ControlEncoder
from ether_diffusion.control.pipelines import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.errors import InputError
from ether_diffusion.files import checksum
from ether_diffusion.images import DAMAGE, read_image
from ether_diffusion.miniature.control_data import HELD_OUT, draw_pair, read_label_image
from ether_diffusion.miniature.render import SIZE
from ether_diffusion.miniature.segmenter import MiniatureSegmenter
from ether_diffusion.training.methods.configs import INDEX_NAME, LORA_NAME
from ether_diffusion.training.seeds import generator

HELP = "measure how well images follow their control images"
COLUMNS = ("file_name", "conditioning_image", "text")
IGNORED = 255
JUDGES = ("miniature", "edges")
UPERNET = "openmmlab/upernet-convnext-small"
SHEET_COLUMNS = 12
SHEET_SIDE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="A pipeline, a folder or an id on the Hub. Default with --miniature: its own.")
    parser.add_argument(
        "--adapter",
        required=True,
        help="A file, folder or id of an adapter with control, or a folder of a ControlNet.",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data_dir", type=Path, help="Folder with metadata.jsonl, see above.")
    data.add_argument(
        "--miniature", type=_positive, metavar="N", help="In place of --data_dir: N held-out maps of the miniature."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for report.json and sheet.png.")
    parser.add_argument("--max_samples", type=_positive, help="Use only the first so many lines of --data_dir.")
    parser.add_argument("--num_inference_steps", type=_positive, default=25, help="Default: 25.")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="Default: 7.5.")
    parser.add_argument("--controlnet_conditioning_scale", type=float, default=1.0, help="Default: 1.0.")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise that images start from. Default: 0.")
    parser.add_argument("--batch_size", type=_positive, default=4, help="Images at once. Default: 4.")
    parser.add_argument(
        "--judge",
        help="miniature: trained here in a few minutes; edges: F1 of Sobel edges, for edge maps; or a UperNet, a "
        f"folder or an id on the Hub. Default: {UPERNET}, with --miniature its own.",
    )
    parser.add_argument(
        "--judge_dir", type=Path, help="Folder where the miniature's judge is kept. Default: in --output_dir."
    )
    parser.add_argument(
        "--reduce_labels",
        action="store_true",
        help="Grey value 0 is no class and the classes start at 1, as in ADE20K.",
    )
    parser.add_argument(
        "--fid_features",
        choices=(*FRECHET_FEATURES, "none"),
        help="Extractor of the Fréchet distance. Default: inception, with --miniature its own, which is not "
        "comparable with published FIDs.",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, needs a whole number from 1")
    return value


@dataclass(frozen=True)
class Sample:
    """A control image, the real image it was made from, its caption; labels (h, w) int64 where they are known."""

    control: Image.Image
    real: Image.Image
    text: str
    labels: Tensor | None


def run(args: argparse.Namespace) -> None:
    if args.base is None and args.miniature is None:
        raise InputError(
            "--base: missing; needs a pipeline, a folder or an id on the Hub (only --miniature has its own)"
        )
    report, sheet = evaluate(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sheet.save(args.output_dir / "sheet.png")
    names = list(report["scores"]["real"])
    print(f"{'':16}" + "".join(f"{name:>16}" for name in names))
    for row, scores in report["scores"].items():
        print(f"{row:16}" + "".join(f"{_show(scores[name]):>16}" for name in names))
    print(args.output_dir / "report.json")


def _show(score: float | None) -> str:
    return "–" if score is None else f"{score:.4f}"


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """Generate, judge: the report, as values of JSON, and the sheet.

    Raises:
        InputError: data that cannot be used, or a package that is missing.
        ValueError: an adapter that does not fit, or a base without a UNet.
        OSError: nothing there, or the Hub cannot be reached.
    """
    base = args.base or str(miniature.FOLDER)
    features = args.fid_features or ("inception" if args.miniature is None else "miniature")
    pipe = _open(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    samples = _held_out(args.miniature, side) if args.miniature else read_samples(args, side)
    _check_features(features, len(samples))
    controlled, options = _controlled(pipe, args)
    judge = _judge(args, device)
    generated = _generate(controlled.to(device), samples, args, "with control", options)
    del pipe, controlled  # the adapter stays in their models, so the base is opened anew
    without = _generate(_open(base).to(device), samples, args, "without control")

    real = [sample.real for sample in samples]
    rows = {"real": real, "with_control": generated, "without_control": without}
    truth = judge.truth(samples)
    scores = {name: judge.scores(images, truth) for name, images in rows.items()}
    if features != "none":
        for name, images in rows.items():
            scores[name]["fid"] = (
                None if images is real else metrics.frechet_distance(images, real, features=features, device=device)
            )
    report = {
        "base": base,
        "adapter": args.adapter,
        "data": str(args.data_dir) if args.data_dir else f"miniature, {HELD_OUT!r}",
        "count": len(samples),
        "settings": {
            name: getattr(args, name)
            for name in ("num_inference_steps", "guidance_scale", "controlnet_conditioning_scale", "seed")
        }
        | {"height": side, "width": side},
        "judge": judge.record,
        "fid_features": features,
        "scores": scores,
    }
    if base == str(miniature.FOLDER):
        report |= {"base": "miniature", "base_sha256": checksum(miniature.FOLDER)}
    return report, draw_sheet([[sample.control for sample in samples], *rows.values()])


def _open(base: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(base)
    if getattr(pipe, "unet", None) is None:
        raise InputError(f"--base {base}: {type(pipe).__name__} has no UNet, which control needs")
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # an image that it blackens would be judged
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_features(features: str, count: int) -> None:
    """Find out before generating what would keep the Fréchet distance from being computed."""
    if features == "none":
        return
    for package in ("torchmetrics", "torch_fidelity")[: 1 + (features == "inception")]:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--fid_features {features}: the package {package} is missing; pip install "
                '"ether-diffusion[eval]", or --fid_features none'
            )
    if count < 2:
        raise InputError(f"--fid_features {features}: got {count} image, needs two; none leaves it out")


# Data -----------------------------------------------------------------------------------------------------------


def _held_out(count: int, side: int) -> list[Sample]:
    if side != SIZE:
        raise InputError(
            f"--miniature: its images have {SIZE} pixels a side, and those of --base {side}; use --data_dir"
        )
    pairs = [draw_pair(HELD_OUT, k) for k in range(count)]
    return [
        Sample(pair.control, pair.image, pair.caption, torch.from_numpy(np.asarray(pair.labels).astype(np.int64)))
        for pair in pairs
    ]


def read_samples(args: argparse.Namespace, side: int) -> list[Sample]:
    """The images that --data_dir names, cut to a square at their centre and brought to `side` pixels.

    Raises:
        InputError: no metadata.jsonl, a line that lacks a column, an image that cannot be read, or labels in some
            lines only.
    """
    index = args.data_dir / "metadata.jsonl"
    if not index.is_file():
        raise InputError(f"--data_dir {args.data_dir}: has no metadata.jsonl; it names the images, a line for each")
    lines = [line for line in index.read_text("utf-8").splitlines() if line.strip()][: args.max_samples]
    if not lines:
        raise InputError(f"--data_dir {args.data_dir}: its metadata.jsonl has no lines")
    samples = []
    for number, line in enumerate(lines, 1):
        where = f"{index}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: {error}; each line is a JSON object") from error
        missing = [name for name in COLUMNS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if missing:
            raise InputError(f"{where}: has no text under {', '.join(missing)}; needs {', '.join(COLUMNS)}")
        real, control = (read_image(args.data_dir / row[name], row[name]) for name in COLUMNS[:2])
        labels = None
        if not isinstance(row.get("labels", ""), str | None):
            raise InputError(f"{where}: got labels={row['labels']!r}, needs the path of an image")
        if row.get("labels"):
            labels = _read_labels(args.data_dir / row["labels"], side, args.reduce_labels)
        elif args.judge == "miniature":
            try:
                labels = torch.from_numpy(np.asarray(_fit(read_label_image(control), side)).astype(np.int64))
            except ValueError as error:
                raise InputError(f"{where}: {row['conditioning_image']}: {error}") from error
        samples.append(Sample(_fit(control, side), _fit(real, side, Image.Resampling.LANCZOS), row["text"], labels))
    known = [sample.labels is not None for sample in samples]
    if any(known) and not all(known):
        raise InputError(
            f"{index}: line {known.index(not known[0]) + 1} has {'no ' * known[0]}labels; all or none need them"
        )
    return samples


def _fit(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), resample)


def _read_labels(path: Path, side: int, reduce: bool) -> Tensor:
    try:
        with Image.open(path) as image:
            mode, indices = image.mode, np.asarray(image)  # of a palette the indices are the classes, not its colours
    except DAMAGE as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    if mode not in ("L", "P", "I", "I;16"):
        raise InputError(f"{path}: is {mode}, needs one grey value for each pixel: the index of its class")
    values = Image.fromarray(indices.astype(np.int32))
    labels = torch.from_numpy(np.array(_fit(values, side))).long()
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1) if reduce else labels


# Generating -------------------------------------------------------------------------------------------------------


def _controlled(
    pipe: DiffusionPipeline, args: argparse.Namespace
) -> tuple[DiffusionPipeline, Callable[[list[Image.Image]], dict[str, Any]]]:
    """The pipeline under control, and what its calls take besides for a list of control images."""
    scale, folder = args.controlnet_conditioning_scale, Path(args.adapter)
    large = isinstance(pipe, StableDiffusionXLPipeline)
    net = next((each for each in (folder, folder / "controlnet") if _is_controlnet(each)), None)
    if net is not None:
        kind = StableDiffusionXLControlNetPipeline if large else StableDiffusionControlNetPipeline
        controlled = kind.from_pipe(pipe, controlnet=ControlNetModel.from_pretrained(net))
        controlled.set_progress_bar_config(disable=True)
        return controlled, lambda maps: {"image": maps, "controlnet_conditioning_scale": scale}
    light = EtherControlXLPipeline if large else EtherControlPipeline
    if (folder / CONTROL).is_dir():  # beside what training with another method has left
        controlled = light.from_pipe(_with_peer(pipe, folder))
        controlled.add_control("control", ControlEncoder.from_pretrained(folder / CONTROL))
    else:
        controlled = light.from_pipe(pipe)
        controlled.load_ether_weights(args.adapter)
    controlled.set_progress_bar_config(disable=True)
    if not controlled.controls:
        raise InputError(f"--adapter {args.adapter}: holds no control encoder, so images would ignore their maps")
    return controlled, lambda maps: {"control_image": maps, "controlnet_conditioning_scale": scale}


def _with_peer(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """The pipeline with what another method than ETHER has left in a folder."""
    if (folder / LORA_NAME).is_file():
        pipe.load_lora_weights(folder)
    elif (folder / INDEX_NAME).is_file():
        return _open(str(folder))
    for config in sorted(folder.glob("*/adapter_config.json")):
        name = config.parent.name
        setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), config.parent).base_model.model)
    return pipe


def _is_controlnet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text("utf-8")).get("_class_name") == ControlNetModel.__name__


def _generate(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    args: argparse.Namespace,
    name: str,
    options: Callable[[list[Image.Image]], dict[str, Any]] = lambda maps: {},
) -> list[Image.Image]:
    """One image for each sample. Sample k starts from the same noise in any batch, with control and without."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(samples), args.batch_size), desc=name, mininterval=5):
        part = samples[start : start + args.batch_size]
        images += pipe(
            [sample.text for sample in part],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[generator(args.seed, "evaluation", start + k) for k in range(len(part))],
            **options([sample.control for sample in part]),
        ).images
    return images


# Judging --------------------------------------------------------------------------------------------------------


class SegmentationScores:
    """Judge by segmentation: mean IoU and pixel accuracy against labels, or against what is seen in real images."""

    def __init__(self, segmenter: metrics.Segmenter, record: dict[str, Any], batch_size: int):
        self.segmenter, self.record, self.batch_size = segmenter, record, batch_size

    def truth(self, samples: Sequence[Sample]) -> list[Tensor]:
        known = samples[0].labels is not None
        self.record["truth"] = "labels" if known else "the judge on the real images"
        if known:
            return [sample.labels for sample in samples]
        return list(self._segment([sample.real for sample in samples]))

    def scores(self, images: Sequence[Image.Image], truth: Sequence[Tensor]) -> dict[str, float]:
        counts = metrics.confusion(self._segment(images), torch.stack(list(truth)), self.segmenter.classes, IGNORED)
        return {"mean_iou": metrics.mean_iou(counts), "pixel_accuracy": metrics.pixel_accuracy(counts)}

    def _segment(self, images: Sequence[Image.Image]) -> Tensor:
        parts = (images[k : k + self.batch_size] for k in range(0, len(images), self.batch_size))
        return torch.cat([self.segmenter(part) for part in parts])


class EdgeScores:
    """Judge by edges: the mean F1 between an image's edges and its control image's."""

    def __init__(self) -> None:
        self.record = {"name": "edges", "threshold": metrics.EDGE_THRESHOLD, "truth": "control images"}

    def truth(self, samples: Sequence[Sample]) -> list[Image.Image]:
        return [sample.control for sample in samples]

    def scores(self, images: Sequence[Image.Image], truth: Sequence[Image.Image]) -> dict[str, float]:
        each = [metrics.edge_consistency(image, wanted) for image, wanted in zip(images, truth, strict=True)]
        return {"edge_f1": sum(each) / len(each)}


def _judge(args: argparse.Namespace, device: torch.device) -> SegmentationScores | EdgeScores:
    name = args.judge or (UPERNET if args.miniature is None else "miniature")
    if name == "edges":
        return EdgeScores()
    if name == "miniature":
        judge = MiniatureSegmenter.load_or_train(args.judge_dir or args.output_dir / "judge")
        return SegmentationScores(judge, {"name": name} | judge.record, batch_size=64)
    return SegmentationScores(metrics.UperNetSegmenter(name, device), {"name": name}, args.batch_size)


# The sheet ------------------------------------------------------------------------------------------------------


def draw_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images, the first SHEET_COLUMNS of each, at most SHEET_SIDE pixels a side."""
    side = min(SHEET_SIDE, rows[0][0].width)
    columns = min(SHEET_COLUMNS, len(rows[0]))
    sheet = Image.new("RGB", (columns * (side + 2), len(rows) * (side + 2)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row[:columns]):
            # Nearest, since a map's colours are classes.
            resample = Image.Resampling.NEAREST if y == 0 else Image.Resampling.LANCZOS
            small = image.convert("RGB").resize((side, side), resample)
            sheet.paste(small, (x * (side + 2), y * (side + 2)))
    return sheet
