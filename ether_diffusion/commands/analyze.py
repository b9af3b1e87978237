"""Measure what an adapter does to the weights of a base model, layer by layer.

  ether-diffusion analyze out/dog
  ether-diffusion analyze out/dog --base stable-diffusion-v1-5/stable-diffusion-v1-5 --output_dir out/analysis
  ether-diffusion analyze out/dog --against out/style
  ether-diffusion analyze out/lora/pytorch_lora_weights.safetensors --output_dir out/analysis-lora

Per layer:
  ‖T − I‖         of each side's transform, the Frobenius norm at strength 1, and the angle, as in `inspect`
  ‖W' − W‖        of the weight, and relative to ‖W‖, at the strength --scale
  energy change   of the neurons' hyperspherical energy, (E' − E)/E; in the half-space form antipodes are one direction
  alignment, commutator  with --against, as in `inspect`

A LoRA file of diffusers has no transform: of it the weights alone are measured. Writes analysis.json and analysis.png
into --output_dir. Formulas: docs/analysis.md. Without weights, `inspect` tells more of the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from ether_diffusion.base_models import MINIATURE
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.commands.tables import UNKNOWN, name_layer, shorten, show, table
from ether_diffusion.errors import InputError

MOST_MOVED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="An adapter: a file, a folder (ours or PEFT's), or an id on the Hub; or a local LoRA."
    )
    parser.add_argument(
        "--base", default=MINIATURE, help="A pipeline: a folder or an id on the Hub. Default: the miniature."
    )
    add_base_version_arguments(parser)
    parser.add_argument("--against", metavar="OTHER", help="A second adapter: where do the two clash?")
    parser.add_argument("--scale", type=float, default=1.0, help="Strength of the adapter. Default: 1.")
    parser.add_argument("--output_dir", type=Path, help="Folder for analysis.json and analysis.png; made if need be.")


def run(args: argparse.Namespace) -> None:
    if not math.isfinite(args.scale):
        raise InputError(f"--scale: got {args.scale}, needs a finite number")
    if args.output_dir is not None and args.output_dir.exists() and not args.output_dir.is_dir():
        raise InputError(f"--output_dir {args.output_dir}: is a file, needs a folder")
    if args.output_dir is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            '--output_dir: the package matplotlib is missing; pip install "ether-diffusion[eval]", or drop the '
            "flag: the table needs none"
        )
    from ether_diffusion.analysis.effect import analyze

    report = analyze(
        args.file,
        base=args.base,
        variant=args.variant,
        revision=args.revision,
        against=args.against,
        strength=args.scale,
    )
    show(*render(report))
    if args.output_dir is not None:
        from ether_diffusion.analysis.plot import draw_layers  # matplotlib is an extra

        args.output_dir.mkdir(parents=True, exist_ok=True)
        written = args.output_dir / "analysis.json", args.output_dir / "analysis.png"
        written[0].write_text(json.dumps(report, indent=2) + "\n")
        draw_layers(report["layers"], written[1], title=shorten(f"{report['file']} on {report['base']}"))
        print("\n".join(["", *map(str, written)]))


def render(report: Mapping[str, Any]) -> Iterator[str | Table]:
    """The lines and tables of a report. What comes from the file is escaped and cut short."""
    layers = report["layers"]
    facts = {"adapter": report["file"], "base": report["base"], "fit": report["fit"], "against": report["against"]}
    yield from (f"{name:8}  {shorten(value)}" for name, value in facts.items() if value is not None)
    yield f"{'strength':8}  {report['strength']:g}\n"
    rows = []
    for name, form, values in _figures(layers):
        found = [(value, row) for value, row in zip(values, layers, strict=True) if value is not None]
        if found:
            most, row = max(found, key=lambda pair: abs(pair[0]))
            rows.append((name, name_layer(row), form.format(mean(value for value, _ in found)), form.format(most)))
    yield from (table((f"of {len(layers)} layers", "most in", "mean", "most"), rows), "")
    moved = sorted(layers, key=lambda row: -row["relative_distance"])[:MOST_MOVED]
    head = ("moved most", "‖W' − W‖", "‖W' − W‖ / ‖W‖", "angle", "energy change")
    yield table(head, [_layer_row(row) for row in moved], texts=1)


def _layer_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    angles = [side["angle"]["mean"] for side in row["sides"].values() if side["angle"]]
    return (
        name_layer(row),
        f"{row['weight_distance']:.3f}",
        f"{row['relative_distance']:.3f}",
        ", ".join(f"{angle:.1f}°" for angle in angles) or UNKNOWN,
        f"{row['energy_change']:+.2%}",
    )


def _figures(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Name, form and values of what is shown of all layers; None where a layer has no such figure."""
    for side in ("input", "output"):
        held = [row["sides"].get(side) for row in layers]
        yield f"‖T − I‖, {side}", "{:.3f}", [each and each["distance"] for each in held]
        yield f"angle, {side}", "{:.1f}°", [each and each["angle"] and each["angle"]["mean"] for each in held]
        for name in ("alignment", "commutator"):
            yield f"{name}, {side}", "{:.3f}", [each and each[name] for each in held]
    yield "‖W' − W‖", "{:.3f}", [row["weight_distance"] for row in layers]
    yield "‖W' − W‖ / ‖W‖", "{:.3f}", [row["relative_distance"] for row in layers]
    yield "energy change", "{:+.2%}", [row["energy_change"] for row in layers]
    yield "half-space energy change", "{:+.2%}", [row["half_space_energy_change"] for row in layers]
