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
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ether_diffusion.commands.tables import UNKNOWN, show, table
from ether_diffusion.evaluation.options import FEATURE_WIDTHS, ControlEvaluation
from ether_diffusion.training.options.command_line import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ControlEvaluation)
    # The names that these two had first.
    for former, name, kind in (("--judge", "evaluator", str), ("--judge_dir", "evaluator_dir", Path)):
        parser.add_argument(former, dest=name, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    evaluate_and_show(ControlEvaluation(**{each.name: getattr(args, each.name) for each in fields(ControlEvaluation)}))


def evaluate_and_show(options: ControlEvaluation) -> None:
    """Evaluate, write report.json and sheet.png, and print the scores and what was written."""
    from ether_diffusion.evaluation.control import evaluate

    report, sheet = evaluate(options)
    path = options.output_dir / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    drawn = options.output_dir / "sheet.png"
    sheet.save(drawn)
    names = list(report["scores"]["real"])
    rows = [
        (row, *(UNKNOWN if scores[name] is None else f"{scores[name]:.4f}" for name in names))
        for row, scores in report["scores"].items()
    ]
    written = [path, drawn]
    if report["judge"].get("fingerprint"):  # a segmenter that is trained here, and kept for the next time
        written.append(options.evaluator_dir or options.output_dir / "evaluator")
    show(table(("", *names), rows, texts=1), *few_images(report), *map(str, written))


def few_images(report: Mapping[str, Any]) -> Iterator[str]:
    """A line of warning where a Fréchet distance was computed over too few images."""
    width = FEATURE_WIDTHS.get(report["fid_features"])
    if width is not None and report["count"] < width:
        yield (
            f"fid: over {report['count']} images, fewer than its features are wide ({width:,}): it comes out too "
            "high, and compares only with one over as many"
        )
