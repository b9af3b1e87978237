"""Look inside an adapter: what it holds, how far it has moved, whether it fits a base and clashes with another.

  ether-diffusion inspect pytorch_ether_weights.safetensors
  ether-diffusion inspect out/dog --base stable-diffusion-v1-5/stable-diffusion-v1-5
  ether-diffusion inspect out/dog --against out/style --layers

Per side of a layer, at strength 1:
  angle      degrees that it has turned since the start of training, over its blocks. Only ETHER+ can tell: ETHER
             starts at a random direction, which the file does not hold.
  distance   of the transform from the identity, ‖T − I‖_F. ETHER's is always 2√blocks; ETHER+'s at most √(2·blocks).
  alignment  with --against: the largest |cosine| between vectors of the two adapters; 1 is a full clash.
  commutator with --against: how much the order of the two matters, ‖T_a T_b − T_b T_a‖_F.

Of weights that were trained as a whole (a control encoder, modules of a ControlNet) it says which they are and how
many. --base opens the pipeline that an adapter with such weights belongs on.

Without --base no model is loaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from ether_diffusion.base_models import base_path
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.commands.tables import UNKNOWN, name_layer, shorten, show, table
from ether_diffusion.errors import InputError
from ether_diffusion.tuner.config import METHOD_NAMES

STRONGEST = 3
"""Conflicts in the summary; --json has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="An adapter: a file, a folder (ours or PEFT's), or an id on the Hub.")
    parser.add_argument(
        "--base", type=base_path, help="A pipeline, as a folder or an id on the Hub, to check the adapter against."
    )
    add_base_version_arguments(parser)
    parser.add_argument("--against", metavar="OTHER", help="A second adapter: where do the two clash?")
    parser.add_argument("--layers", action="store_true", help="Also list every layer.")
    parser.add_argument("--json", action="store_true", help="Print all of it as one JSON object.")


def run(args: argparse.Namespace) -> None:
    if args.base is None and (args.variant or args.revision):
        raise InputError("--variant and --revision are those of the base: give --base as well")
    from ether_diffusion.analysis.report import describe

    report = describe(args.file, base=args.base, variant=args.variant, revision=args.revision, against=args.against)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(*render(report, layers=args.layers))


def render(report: Mapping[str, Any], *, layers: bool = False) -> Iterator[str | Table]:
    """The lines and tables of a report. What comes from the file is escaped and cut short."""
    versions = report["versions"] or {}
    facts = {
        "adapter": report["file"],
        "format": f"version {report['format_version']}" if report["format_version"] else "a folder of PEFT",
        "written by": ", ".join(f"{name} {number}" for name, number in versions.items()) or UNKNOWN,
        "base model": report["base_model"] or UNKNOWN,
        "prompt": UNKNOWN if report["prompt"] is None else report["prompt"],
        "parameters": f"{report['parameters']:,} in a file of {report['file_bytes']:,} bytes",
    }
    yield from (f"{name:10}  {shorten(value)}" for name, value in facts.items())
    if fit := report["fit"]:
        yield f"{'fit':10}  {fit['verdict']} on {fit['base']}" + (f": {fit['error']}" if fit["error"] else "")
    if report["components"]:
        head = ("component", "method", "sides", "blocks", "layers", "parameters", "bytes", "angle", "distance")
        rows = [_component_row(entry, report["layers"]) for entry in report["components"]]
        yield from ("", table(head, rows, texts=3))
    if report["weights"]:
        head = ("component", "trained as a whole", "tensors", "parameters", "bytes")
        yield from ("", table(head, [_weights_row(entry) for entry in report["weights"]]))
    if against := report["against"]:
        yield from ("", *_render_conflicts(against))
    if layers:
        yield from ("", _layer_table(report))


def _component_row(entry: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    own = [row for row in layers if row["component"] == entry["component"]]
    angles = [row["angle"]["mean"] for row in own if row["angle"]]
    return (
        shorten(entry["component"] or UNKNOWN),
        METHOD_NAMES[entry["method"]],
        entry["sides"],
        *(f"{entry[name]:,}" for name in ("num_blocks", "layers", "parameters", "bytes")),
        f"{sum(angles) / len(angles):.1f}°" if angles else UNKNOWN,
        f"{sum(row['distance'] for row in own) / len(own):.3f}",
    )


def _weights_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    config = entry.get("config")
    if config and entry.get("kind") == "latent":
        patch = config["patch_size"]
        columns = f"{config['in_channels'] * patch**2} to {config['out_channels']}"
        what = f"control encoder of latents, {columns} channels, patches of {patch}, {config['interpolation']}"
    elif config:
        widths = (config["conditioning_channels"], *config["block_out_channels"], config["out_channels"])
        what = f"control encoder, channels {'-'.join(map(str, widths))}, {config['interpolation']}"
    else:
        what = ", ".join(entry["modules"])
    numbers = (f"{entry[name]:,}" for name in ("tensors", "parameters", "bytes"))
    return (shorten(entry["component"]), shorten(what), *numbers)


def _render_conflicts(against: Mapping[str, Any]) -> Iterator[str | Table]:
    rows = against["conflicts"]
    yield shorten(
        f"against {against['file']}: {len(rows)} sides of layers in common, of {against['sides']} here and "
        f"{against['sides_of_other']} there"
    )
    if rows:
        head = ("strongest", "side", "alignment", "commutator")
        yield table(head, [(name_layer(row), row["side"], *_conflict_cells(row)) for row in rows[:STRONGEST]])


def _conflict_cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    return (f"{row['alignment']:.3f}", f"{row['commutator']:.3f}") if row else (UNKNOWN, UNKNOWN)


def _layer_table(report: Mapping[str, Any]) -> Table:
    against = report["against"]
    conflicts = {(name_layer(row), row["side"]): row for row in (against["conflicts"] if against else ())}
    head = ("layer", "side", "width", "blocks", "angle", "largest", "distance")
    rows = []
    for row in report["layers"]:
        layer, angle = name_layer(row), row["angle"]
        turned = (f"{angle['mean']:.1f}°", f"{angle['max']:.1f}°") if angle else (UNKNOWN, UNKNOWN)
        cells = (layer, row["side"], str(row["width"]), str(row["num_blocks"]), *turned, f"{row['distance']:.3f}")
        rows.append(cells + (_conflict_cells(conflicts.get((layer, row["side"]))) if against else ()))
    return table((*head, "alignment", "commutator") if against else head, rows)
