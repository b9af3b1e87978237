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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.fit import plan
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.reading import PEFT_WEIGHTS_NAME
from ether_diffusion.adapters.schema import AdapterFile, ModuleWeights, canonical_path
from ether_diffusion.adapters.writing import collect
from ether_diffusion.analysis.weights import angles_from_start, conflict, transform_distance, transform_of
from ether_diffusion.control.encoder import CONTROL, ControlEncoder
from ether_diffusion.control.pipelines import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.errors import EtherFileError, printable
from ether_diffusion.tuner.transforms import Transform

HELP = "show what is in an adapter file, how far it has moved, and what it fits"
METHODS = {"ether": "ETHER", "ether_plus": "ETHER+"}
CONTROLNET = "controlnet"
CONTROLLED = {
    StableDiffusionPipeline: (EtherControlPipeline, StableDiffusionControlNetPipeline),
    StableDiffusionXLPipeline: (EtherControlXLPipeline, StableDiffusionXLControlNetPipeline),
}
"""Stock pipeline -> the one with light control, the one with a ControlNet."""
UNKNOWN = "–"
LONGEST_TEXT = 200
STRONGEST = 3

Side = tuple[str | None, str, str]
"""Component, canonical module path, "input" or "output"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="An adapter: a file, a folder (ours or PEFT's), or an id on the Hub.")
    parser.add_argument("--base", help="A pipeline, as a folder or an id on the Hub, to check the adapter against.")
    parser.add_argument("--against", metavar="OTHER", help="A second adapter: where do the two clash?")
    parser.add_argument("--layers", action="store_true", help="Also list every layer.")
    parser.add_argument("--json", action="store_true", help="Print all of it as one JSON object.")


def run(args: argparse.Namespace) -> None:
    report = describe(args.file, base=args.base, against=args.against)
    print(json.dumps(report, indent=2) if args.json else "\n".join(render(report, layers=args.layers)))


# Gathering ------------------------------------------------------------------------------------------------------


def describe(file: str | Path, *, base: str | None = None, against: str | Path | None = None) -> dict[str, Any]:
    """All that `inspect` says of an adapter, as values of JSON.

    Raises:
        EtherFileError: an adapter that cannot be read, or `against` is one for layers of other widths.
        ValueError: an adapter that does not name its component (a folder of PEFT) against one that does.
        OSError: nothing there, or the Hub cannot be reached.
    """
    checkpoint = find_adapter_file(file)
    other = None if against is None else find_adapter_file(against)
    fit = None
    if base is not None:
        pipe = open_base(base, checkpoint)
        if other is not None and None in other.configs:
            other, _ = plan(pipe, other)
        checkpoint, fit = check_fit(pipe, checkpoint)
    sides = transforms_of(checkpoint)
    metadata = checkpoint.metadata
    parts = [*checkpoint.tensors.values(), *(whole.tensors for whole in checkpoint.weights.values())]
    return {
        "file": checkpoint.source,
        "file_bytes": _file_of(checkpoint).stat().st_size,
        "format_version": metadata.get("format_version"),
        "versions": metadata.get("versions"),
        "base_model": metadata.get("base_model"),
        "prompt": None if metadata.get("prompt") is None else str(metadata["prompt"]),
        "parameters": sum(tensor.numel() for part in parts for tensor in part.values()),
        "components": [_describe_component(checkpoint, component) for component in checkpoint.configs],
        "weights": [_describe_whole(component, whole) for component, whole in checkpoint.weights.items()],
        "layers": [_describe_side(side, transform) for side, transform in sides.items()],
        "fit": None if fit is None else {"base": base, **fit},
        "against": None if other is None else compare(checkpoint, other),
    }


def _file_of(checkpoint: AdapterFile) -> Path:
    path = Path(checkpoint.source)
    return path / PEFT_WEIGHTS_NAME if path.is_dir() else path


def transforms_of(checkpoint: AdapterFile) -> dict[Side, Transform]:
    """The transform of every side of every layer."""
    raws: dict[Side, dict[str, Any]] = {}
    for component, vectors in checkpoint.tensors.items():
        for key, tensor in sorted(vectors.items()):
            path, _, name = key.rpartition(".")
            side = (component, canonical_path(component or "", path), "output" if name.endswith("_out") else "input")
            raws.setdefault(side, {})[name.removeprefix("ether_").removesuffix("_out")] = tensor
    return {side: transform_of(**raw) for side, raw in raws.items()}


def _describe_component(checkpoint: AdapterFile, component: str | None) -> dict[str, Any]:
    config, vectors = checkpoint.configs[component], checkpoint.tensors[component]
    return {
        "component": component,
        "method": config.method,
        "sides": config.sides,
        "num_blocks": config.num_blocks,
        "layers": len({key.rpartition(".")[0] for key in vectors}),
        **_measure(vectors),
    }


def _describe_whole(component: str, whole: ModuleWeights) -> dict[str, Any]:
    return {"component": component, **whole.about, "tensors": len(whole.tensors), **_measure(whole.tensors)}


def _measure(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
    }


def _describe_side(side: Side, transform: Transform) -> dict[str, Any]:
    angles, unit = angles_from_start(transform), transform.units[0]
    return {
        **_name_side(side),
        "num_blocks": len(unit),
        "width": unit.numel(),
        "parameters": sum(each.numel() for each in transform.units),
        "angle": None if angles is None else {"mean": angles.mean().item(), "max": angles.max().item()},
        "distance": transform_distance(transform),
    }


def _name_side(side: Side) -> dict[str, Any]:
    return dict(zip(("component", "path", "side"), side, strict=True))


def open_base(base: str, checkpoint: AdapterFile) -> DiffusionPipeline:
    """The base, as the pipeline that an adapter with a control encoder, or one for a ControlNet, is loaded onto.

    The ControlNet is what training starts from, a copy of the UNet. For other adapters, and of other classes, the base
    is opened as it is.
    """
    pipe = DiffusionPipeline.from_pretrained(base)
    light, with_controlnet = CONTROLLED.get(type(pipe), (None, None))
    if light is not None and CONTROL in checkpoint.weights:
        return light.from_pipe(pipe)
    if with_controlnet is not None and CONTROLNET in {*checkpoint.configs, *checkpoint.weights}:
        widths = ControlEncoder.for_unet(pipe.unet, factor=pipe.vae_scale_factor).config.block_out_channels
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)
        return with_controlnet.from_pipe(pipe, controlnet=controlnet)
    return pipe


def check_fit(pipe: DiffusionPipeline, checkpoint: AdapterFile) -> tuple[AdapterFile, dict[str, str | None]]:
    """Whether an adapter fits a pipeline, and whether its weights are those that it was trained on.

    Puts the adapter on where it fits. Returns the checkpoint, its component named, and the verdict with the error.
    """
    try:
        checkpoint, _ = plan(pipe, checkpoint)
    except EtherFileError as error:
        return checkpoint, {"verdict": "does not fit", "error": str(error)}
    attach(pipe, checkpoint, "inspected")
    now = collect(pipe, "inspected").metadata["base_fingerprint"]
    same = same_weights(checkpoint.metadata.get("base_fingerprint", {}), now)
    verdicts = {True: "fits, same weights", False: "fits, other weights", None: "fits, weights cannot be compared"}
    return checkpoint, {"verdict": verdicts[same], "error": None}


def same_weights(then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Whether the fingerprints of all components, component -> dtype -> SHA-256, agree in a dtype.

    One dtype is enough: a model that was stored in float16 or bfloat16 agrees in that one alone. None: a component
    has no fingerprint in a common dtype, and no other disagrees; or there is none to compare.
    """
    agreements = []
    for component, prints in now.items():
        recorded = then.get(component, {})
        common = prints.keys() & recorded.keys()
        agreements.append(any(prints[dtype] == recorded[dtype] for dtype in common) if common else None)
    return False if False in agreements else None if None in agreements or not agreements else True


def compare(checkpoint: AdapterFile, other: AdapterFile) -> dict[str, Any]:
    """The conflicts between two adapters, strongest first, on the sides of layers that both have.

    Raises:
        EtherFileError: a layer has different widths in the two.
        ValueError: one of them does not name its component and the other does.
    """
    if (None in checkpoint.configs) != (None in other.configs):
        unnamed = checkpoint if None in checkpoint.configs else other
        raise ValueError(f"{unnamed.source} does not say which component it adapts; --base tells, if it fits")
    ours, theirs = transforms_of(checkpoint), transforms_of(other)
    rows = []
    for side in [side for side in ours if side in theirs]:
        try:
            found = conflict(ours[side], theirs[side])
        except ValueError as error:
            raise EtherFileError(f"{other.source}: {side[1]} is not as in {checkpoint.source}: {error}") from error
        rows.append(_name_side(side) | found._asdict())
    rows.sort(key=lambda row: -row["alignment"])
    return {"file": other.source, "sides": len(ours), "sides_of_other": len(theirs), "conflicts": rows}


# Showing --------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any], *, layers: bool = False) -> Iterable[str]:
    """The lines of a report. What comes from the file is escaped and cut short."""
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
        yield ""
        yield from table(
            ("component", "method", "sides", "blocks", "layers", "parameters", "bytes", "angle", "distance"),
            [_component_row(entry, report["layers"]) for entry in report["components"]],
            texts=3,
        )
    if report["weights"]:
        yield ""
        yield from table(
            ("component", "trained as a whole", "tensors", "parameters", "bytes"),
            [_whole_row(entry) for entry in report["weights"]],
        )
    if against := report["against"]:
        yield ""
        yield from _render_conflicts(against)
    if layers:
        yield ""
        yield from _render_layers(report)


def _component_row(entry: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    own = [row for row in layers if row["component"] == entry["component"]]
    angles = [row["angle"]["mean"] for row in own if row["angle"]]
    return (
        shorten(entry["component"] or UNKNOWN),
        METHODS[entry["method"]],
        entry["sides"],
        str(entry["num_blocks"]),
        str(entry["layers"]),
        f"{entry['parameters']:,}",
        f"{entry['bytes']:,}",
        f"{sum(angles) / len(angles):.1f}°" if angles else UNKNOWN,
        f"{sum(row['distance'] for row in own) / len(own):.3f}",
    )


def _whole_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if config := entry.get("config"):
        widths = (config["conditioning_channels"], *config["block_out_channels"], config["out_channels"])
        what = f"control encoder, channels {'-'.join(map(str, widths))}, {config['interpolation']}"
    else:
        what = ", ".join(entry["modules"])
    numbers = (f"{entry[name]:,}" for name in ("tensors", "parameters", "bytes"))
    return (shorten(entry["component"]), shorten(what), *numbers)


def _render_conflicts(against: Mapping[str, Any]) -> Iterable[str]:
    rows = against["conflicts"]
    yield shorten(
        f"against {against['file']}: {len(rows)} sides of layers in common, of {against['sides']} here and "
        f"{against['sides_of_other']} there"
    )
    if rows:
        yield from table(
            ("strongest", "side", "alignment", "commutator"),
            [
                (place_of(row), row["side"], f"{row['alignment']:.3f}", f"{row['commutator']:.3f}")
                for row in rows[:STRONGEST]
            ],
        )


def _render_layers(report: Mapping[str, Any]) -> Iterable[str]:
    against = report["against"]
    clashes = {(place_of(row), row["side"]): row for row in (against["conflicts"] if against else ())}
    columns = ("layer", "side", "width", "blocks", "angle", "largest", "distance")
    rows = []
    for row in report["layers"]:
        angle, clash = row["angle"], clashes.get((place_of(row), row["side"]))
        turned = (f"{angle['mean']:.1f}°", f"{angle['max']:.1f}°") if angle else (UNKNOWN, UNKNOWN)
        cells = (
            place_of(row),
            row["side"],
            str(row["width"]),
            str(row["num_blocks"]),
            *turned,
            f"{row['distance']:.3f}",
        )
        if against:
            cells += (f"{clash['alignment']:.3f}", f"{clash['commutator']:.3f}") if clash else (UNKNOWN, UNKNOWN)
        rows.append(cells)
    yield from table((*columns, "alignment", "commutator") if against else columns, rows)


def place_of(row: Mapping[str, Any]) -> str:
    return shorten(f"{row['component']}.{row['path']}" if row["component"] else row["path"])


def shorten(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 2]} …"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 2) -> Iterable[str]:
    """Columns under their heads: the first `texts` to the left, the numbers after them to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(w) if k < texts else cell.rjust(w) for k, (cell, w) in enumerate(cells))
