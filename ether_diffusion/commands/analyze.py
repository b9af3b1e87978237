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

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.fit import plan
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, canonical_path
from ether_diffusion.analysis.weights import (
    adapted_weights,
    angles_from_start,
    energy_change,
    hyperspherical_energy,
    transform_distance,
    weight_distance,
)
from ether_diffusion.commands.inspect import (
    UNKNOWN,
    check_fit,
    compare,
    open_base,
    place_of,
    shorten,
    table,
    transforms_of,
)
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.miniature import FOLDER
from ether_diffusion.training.methods.configs import LORA_NAME
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import Transform

HELP = "measure what an adapter does to the weights of a base model"
NAME = "inspected"  # as `check_fit` calls the adapter
MOST_MOVED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="An adapter: a file, a folder (ours or PEFT's), or an id on the Hub; or a local LoRA."
    )
    parser.add_argument(
        "--base", default=str(FOLDER), help="A pipeline, as a folder or an id on the Hub. Default: the miniature."
    )
    parser.add_argument("--against", metavar="OTHER", help="A second adapter: where do the two clash?")
    parser.add_argument("--scale", type=float, default=1.0, help="Strength of the adapter. Default: 1.")
    parser.add_argument("--output_dir", type=Path, help="Folder for analysis.json and analysis.png; made if need be.")


def run(args: argparse.Namespace) -> None:
    if not math.isfinite(args.scale):
        raise InputError(f"--scale: got {args.scale}, needs a finite number")
    if args.output_dir is not None:
        _check_output(args.output_dir)
    report = analyze(args.file, base=args.base, against=args.against, strength=args.scale)
    print("\n".join(render(report)))
    if args.output_dir is not None:
        from ether_diffusion.analysis.plot import draw_layers

        args.output_dir.mkdir(parents=True, exist_ok=True)
        written = args.output_dir / "analysis.json", args.output_dir / "analysis.png"
        written[0].write_text(json.dumps(report, indent=2) + "\n")
        draw_layers(report["layers"], written[1], title=shorten(f"{report['file']} on {report['base']}"))
        print("\n".join(["", *map(str, written)]))


def _check_output(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: is a file, needs a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            '--output_dir: the package matplotlib is missing; pip install "ether-diffusion[eval]", or drop the '
            "flag: the table needs none"
        )


# Gathering ------------------------------------------------------------------------------------------------------


def analyze(
    file: str | Path, *, base: str | Path = FOLDER, against: str | Path | None = None, strength: float = 1.0
) -> dict[str, Any]:
    """All that `analyze` says of an adapter, as values of JSON.

    Raises:
        ValueError: an adapter that cannot be read, holds no adapted layer, or does not fit the base.
        OSError: nothing there, or the Hub cannot be reached.
    """
    lora = _lora_file(Path(file))
    if lora is not None and against is not None:
        raise InputError(f"--against: compares adapters of ETHER, but {file} is a LoRA")
    transforms, conflicts, verdict = {}, [], None
    if lora is not None:
        pipe = _with_lora(str(base), lora)
    else:
        checkpoint = find_adapter_file(file)
        other = None if against is None else find_adapter_file(against)  # both before the base, which takes longer
        if not checkpoint.tensors:
            raise InputError(f"{checkpoint.source}: holds no vectors of ETHER, needs an adapter that has some")
        pipe = open_base(str(base), checkpoint)
        if other is not None and None in other.configs:
            other, _ = plan(pipe, other)
        checkpoint, fit = check_fit(pipe, checkpoint)
        if fit["error"]:
            raise EtherFileError(fit["error"])
        transforms, verdict = transforms_of(checkpoint), fit["verdict"]
        conflicts = compare(checkpoint, other)["conflicts"] if other is not None else []
        if other is not None and not conflicts:
            raise InputError(f"--against: {against} adapts no layer that {file} does; there is nothing to compare")
    pipe.set_adapters([NAME], [strength])
    clashes = {(row["component"], row["path"], row["side"]): row for row in conflicts}
    layers = []
    for component, model in models_of(pipe).items():
        if any(isinstance(layer, BaseTunerLayer) for layer in model.modules()):
            for path, before, after in adapted_weights(model):
                name = canonical_path(component, path)
                sides = {
                    side[2]: _describe_side(transform, clashes.get(side))
                    for side, transform in transforms.items()
                    if side[:2] == (component, name)
                }
                weights = _describe_weights(model.get_submodule(path), before, after)
                layers.append({"component": component, "path": name, "sides": sides, **weights})
    return {
        "file": str(lora) if lora is not None else checkpoint.source,
        "base": "the miniature" if Path(base) == FOLDER else str(base),
        "fit": verdict,
        "strength": strength,
        "against": None if against is None else str(against),
        "layers": layers,
    }


def _lora_file(path: Path) -> Path | None:
    """The file, if what is there is a LoRA for diffusers' pipelines."""
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        path = path / LORA_NAME
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return path if any("lora" in key for key in file.keys()) else None
    except SafetensorError:
        return None  # `find_checkpoint` says what is wrong with it


def _with_lora(base: str, file: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(base)
    try:
        pipe.load_lora_weights(file, adapter_name=NAME)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{file}: is no LoRA for {base}: {str(error).splitlines()[0]}") from error
    if not any(isinstance(layer, BaseTunerLayer) for model in models_of(pipe).values() for layer in model.modules()):
        raise InputError(f"{file}: no layer of {base} has the name of one in this LoRA")
    return pipe


def _describe_side(transform: Transform, clash: Mapping[str, Any] | None) -> dict[str, Any]:
    angles = angles_from_start(transform)
    return {
        "distance": transform_distance(transform),
        "angle": None if angles is None else {"mean": angles.mean().item(), "max": angles.max().item()},
        "alignment": None if clash is None else clash["alignment"],
        "commutator": None if clash is None else clash["commutator"],
    }


def _describe_weights(layer: nn.Module, before: Tensor, after: Tensor) -> dict[str, float]:
    if isinstance(layer, EtherLayer):  # exact, where the difference of two weights is rounded
        distance = weight_distance(before, layer.vectors(NAME), layer.scaling[NAME])
    else:
        distance = torch.linalg.vector_norm(after.double() - before.double()).item()
    return {
        "weight_distance": distance,
        "relative_distance": distance / torch.linalg.vector_norm(before.double()).item(),
        "energy": hyperspherical_energy(before),
        "energy_change": energy_change(before, after),
        "half_space_energy_change": energy_change(before, after, half_space=True),
    }


# Showing --------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a report. What comes from the file is escaped and cut short."""
    layers = report["layers"]
    facts = {"adapter": report["file"], "base": report["base"], "fit": report["fit"], "against": report["against"]}
    yield from (f"{name:8}  {shorten(value)}" for name, value in facts.items() if value is not None)
    yield f"{'strength':8}  {report['strength']:g}"
    yield ""
    rows = []
    for name, form, values in _figures(layers):
        found = [(value, row) for value, row in zip(values, layers, strict=True) if value is not None]
        if found:
            most, row = max(found, key=lambda pair: abs(pair[0]))
            rows.append((name, place_of(row), form.format(mean(value for value, _ in found)), form.format(most)))
    yield from table((f"of {len(layers)} layers", "most in", "mean", "most"), rows)
    yield ""
    moved = sorted(layers, key=lambda row: -row["relative_distance"])[:MOST_MOVED]
    yield from table(
        ("moved most", "‖W' − W‖", "‖W' − W‖ / ‖W‖", "angle", "energy change"),
        [
            (
                place_of(row),
                f"{row['weight_distance']:.3f}",
                f"{row['relative_distance']:.3f}",
                ", ".join(f"{side['angle']['mean']:.1f}°" for side in row["sides"].values() if side["angle"])
                or UNKNOWN,
                f"{row['energy_change']:+.2%}",
            )
            for row in moved
        ],
        texts=1,
    )


def _figures(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Name, form and values of what is shown of all layers; None where a layer has no such figure."""
    for side in ("input", "output"):
        held = [row["sides"].get(side) for row in layers]
        yield f"‖T − I‖, {side}", "{:.3f}", [each and each["distance"] for each in held]
        yield f"angle, {side}", "{:.1f}°", [each and each["angle"] and each["angle"]["mean"] for each in held]
        yield f"alignment, {side}", "{:.3f}", [each and each["alignment"] for each in held]
        yield f"commutator, {side}", "{:.3f}", [each and each["commutator"] for each in held]
    yield "‖W' − W‖", "{:.3f}", [row["weight_distance"] for row in layers]
    yield "‖W' − W‖ / ‖W‖", "{:.3f}", [row["relative_distance"] for row in layers]
    yield "energy change", "{:+.2%}", [row["energy_change"] for row in layers]
    yield "half-space energy change", "{:+.2%}", [row["half_space_energy_change"] for row in layers]
