"""Measure control: generate one image for each control image, and score whether it is what was asked for.

  ether-diffusion evaluate-control --miniature 200 --adapter out/control --output_dir out/control-evaluation
  ether-diffusion evaluate-control --base stable-diffusion-v1-5/stable-diffusion-v1-5 --adapter out/control \\
      --data_dir ade20k/validation --reduce_labels --output_dir out/control-evaluation

--data_dir is a folder with metadata.jsonl: a line for each image with file_name, conditioning_image, text and, if
there is one, labels: an image whose grey values are indices of classes (255 is not counted). Without labels, what
the evaluator sees in the real image is taken for the truth.

Writes report.json and sheet.png (rows: control images, real images, generated with control, generated without).
The report's scores of the real images are the evaluator's own ceiling, those without control the floor.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path

from ether_diffusion.commands.tables import UNKNOWN, show, table
from ether_diffusion.evaluation.control import NO_FEATURES, UPERNET, ControlEvaluation, evaluate
from ether_diffusion.evaluation.features import FRECHET_FEATURES


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
    parser.add_argument("--num_inference_steps", type=_positive, help="Default: %(default)s.")
    parser.add_argument("--guidance_scale", type=float, help="Default: %(default)s.")
    parser.add_argument("--controlnet_conditioning_scale", type=float, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, help="Of the noise that images start from. Default: %(default)s.")
    parser.add_argument("--batch_size", type=_positive, help="Images at once. Default: %(default)s.")
    parser.add_argument(
        "--evaluator",
        "--judge",
        help="miniature: trained here in a few minutes; edges: F1 of Sobel edges, for edge maps; or a UperNet, a "
        f"folder or an id on the Hub. Default: {UPERNET}, with --miniature its own.",
    )
    parser.add_argument(
        "--evaluator_dir",
        "--judge_dir",
        type=Path,
        help="Folder where the miniature's evaluator is kept. Default: in --output_dir.",
    )
    parser.add_argument(
        "--reduce_labels",
        action="store_true",
        help="Grey value 0 is no class and the classes start at 1, as in ADE20K.",
    )
    parser.add_argument(
        "--fid_features",
        choices=(*FRECHET_FEATURES, NO_FEATURES),
        help="Extractor of the Fréchet distance. Default: inception, with --miniature its own, which is not "
        "comparable with published FIDs.",
    )
    parser.set_defaults(
        **{each.name: each.default for each in fields(ControlEvaluation) if each.default is not MISSING}
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, needs a whole number from 1")
    return value


def run(args: argparse.Namespace) -> None:
    evaluate_and_show(ControlEvaluation(**{each.name: getattr(args, each.name) for each in fields(ControlEvaluation)}))


def evaluate_and_show(options: ControlEvaluation) -> None:
    """Evaluate, write report.json and sheet.png, and print the scores."""
    report, sheet = evaluate(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sheet.save(options.output_dir / "sheet.png")
    names = list(report["scores"]["real"])
    rows = [
        (row, *(UNKNOWN if scores[name] is None else f"{scores[name]:.4f}" for name in names))
        for row, scores in report["scores"].items()
    ]
    show(table(("", *names), rows, texts=1), str(path))
