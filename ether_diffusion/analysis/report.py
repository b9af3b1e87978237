"""What an adapter holds, how far it has turned, whether it fits a base, and where it conflicts with another adapter.

Reports are dictionaries of JSON values. None of them needs the base model, except to answer whether the adapter fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from ether_diffusion.adapters import fit as fitting
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.reading import PEFT_WEIGHTS_NAME
from ether_diffusion.adapters.schema import AdapterFile, canonical_path
from ether_diffusion.adapters.writing import collect
from ether_diffusion.analysis.weights import angles_from_start, conflict, transform_distance, transform_of
from ether_diffusion.base_models import open_pipeline
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.control.controlnets import controlnets_for, with_controlnet
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.control.pipelines import denoiser_name, over
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.tuner.transforms import Transform

ADAPTER = "inspected"
"""The name under which an adapter is attached to the base that it is checked against."""
Side = tuple[str | None, str, str]
"""Component, canonical module path, "input" or "output"."""


def describe(
    file: str | Path,
    *,
    base: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    against: str | Path | None = None,
) -> dict[str, Any]:
    """Describe an adapter file: components, parameters, the transform of every layer, fit and conflicts.

    Args:
        file: an adapter: a file, a folder (ours or PEFT's), or an id on the Hub.
        base: a pipeline, as a folder or an id on the Hub, to check the adapter against.
        variant, revision: of the base, as `from_pretrained` takes them.
        against: a second adapter, to look for conflicts with.

    Raises:
        EtherFileError: an adapter that cannot be read, or `against` is one for layers of other widths.
        ValueError: an adapter that does not name its component (a folder of PEFT) against one that does.
        OSError: nothing there, or the Hub cannot be reached.
    """
    adapter = find_adapter_file(file)
    other = None if against is None else find_adapter_file(against)
    fit = None
    if base is not None:
        adapter, other, fit = check_fit(open_base(base, adapter, variant, revision), adapter, other)
    path, metadata = Path(adapter.source), adapter.metadata
    if path.is_dir():
        path = path / PEFT_WEIGHTS_NAME
    components = [
        {
            "component": component,
            "method": config.method,
            "sides": config.sides,
            "num_blocks": config.num_blocks,
            "layers": len({key.rpartition(".")[0] for key in adapter.tensors[component]}),
            **_sizes(adapter.tensors[component]),
        }
        for component, config in adapter.configs.items()
    ]
    weights = [
        {"component": component, **held.about, "tensors": len(held.tensors), **_sizes(held.tensors)}
        for component, held in adapter.weights.items()
    ]
    return {
        "file": adapter.source,
        "file_bytes": path.stat().st_size,
        "format_version": metadata.get("format_version"),
        "versions": metadata.get("versions"),
        "base_model": metadata.get("base_model"),
        "prompt": None if metadata.get("prompt") is None else str(metadata["prompt"]),
        "parameters": sum(part["parameters"] for part in (*components, *weights)),
        "components": components,
        "weights": weights,
        "layers": [
            {
                **_name_side(side),
                "num_blocks": len(transform.units[0]),
                "width": transform.units[0].numel(),
                "parameters": sum(unit.numel() for unit in transform.units),
                **measure(transform),
            }
            for side, transform in transforms_of(adapter).items()
        ],
        "fit": None if fit is None else {"base": base, **fit},
        "against": None if other is None else compare(adapter, other),
    }


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
    }


def transforms_of(adapter: AdapterFile) -> dict[Side, Transform]:
    """The transform of every side of every layer that an adapter file has vectors for."""
    vectors_of: dict[Side, dict[str, Tensor]] = {}
    for component, tensors in adapter.tensors.items():
        for key, tensor in sorted(tensors.items()):
            path, _, name = key.rpartition(".")
            side = (component, canonical_path(component or "", path), "output" if name.endswith("_out") else "input")
            vectors_of.setdefault(side, {})[name.removeprefix("ether_").removesuffix("_out")] = tensor
    return {side: transform_of(**vectors) for side, vectors in vectors_of.items()}


def _name_side(side: Side) -> dict[str, Any]:
    return dict(zip(("component", "path", "side"), side, strict=True))


def measure(transform: Transform) -> dict[str, Any]:
    """How far a transform lies from the identity, and by how many degrees it has turned (None for ETHER)."""
    angles = angles_from_start(transform)
    return {
        "angle": None if angles is None else {"mean": angles.mean().item(), "max": angles.max().item()},
        "distance": transform_distance(transform),
    }


# Fit ------------------------------------------------------------------------------------------------------------


def open_base(
    base: str, adapter: AdapterFile, variant: str | None = None, revision: str | None = None
) -> diffusers.DiffusionPipeline:
    """Open the base as the pipeline that the adapter is made for: with control where the adapter has control.

    A ControlNet starts as training starts it, as a copy of the denoiser's first layers. For other adapters, and of
    other classes, the base is opened as it is.
    """
    pipe = open_pipeline(base, variant=variant, revision=revision)
    name, controlnet = type(pipe).__name__, "controlnet"
    if name in CONTROL_PIPELINES and CONTROL in adapter.weights:
        return over(CONTROL_PIPELINES[name], pipe)
    kind = controlnets_for(name)
    if kind is None or controlnet not in {*adapter.configs, *adapter.weights}:
        return pipe
    held = adapter.weights.get(controlnet)
    layers = kind.layers_in(held.tensors if held is not None else ())
    try:
        nets = kind(getattr(pipe, denoiser_name(pipe)), pipe.vae_scale_factor, layers)
    except InputError:  # one that training did not begin as a copy
        return pipe
    return with_controlnet(pipe, nets.copy_of(nets.denoiser))


def check_fit(
    pipe: diffusers.DiffusionPipeline, adapter: AdapterFile, other: AdapterFile | None = None
) -> tuple[AdapterFile, AdapterFile | None, dict[str, str | None]]:
    """Check whether an adapter fits a pipeline, and whether it was trained on that pipeline's weights.

    Attaches the adapter, as ADAPTER, where it fits. `other` is only told its component where it does not name it.

    Returns:
        Both adapters, with their components named, and {"verdict": …, "error": the reason why it does not fit}.

    Raises:
        EtherFileError: `other` does not name its component, and it fits none or several of the pipeline's.
    """
    if other is not None and None in other.configs:
        other = fitting.fit(pipe, other).file
    try:
        adapter = fitting.fit(pipe, adapter).file
    except EtherFileError as error:
        return adapter, other, {"verdict": "does not fit", "error": str(error)}
    attach(pipe, adapter, ADAPTER)
    now = collect(pipe, ADAPTER).metadata["base_fingerprint"]
    same = same_weights(adapter.metadata.get("base_fingerprint", {}), now)
    verdicts = {True: "fits, same weights", False: "fits, other weights", None: "fits, weights cannot be compared"}
    return adapter, other, {"verdict": verdicts[same], "error": None}


def same_weights(then: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Compare fingerprints, component -> dtype -> SHA-256: True where those of all components agree in one dtype.

    One dtype is enough: a model that was stored in float16 or bfloat16 agrees in that one alone. None: a component
    has no fingerprint in a common dtype, and no other disagrees; or there is none to compare.
    """
    agreements = []
    for component, prints in now.items():
        recorded = then.get(component, {})
        common = prints.keys() & recorded.keys()
        agreements.append(bool(prints.items() & recorded.items()) if common else None)
    return False if False in agreements else None if None in agreements or not agreements else True


# Conflicts ------------------------------------------------------------------------------------------------------


def compare(adapter: AdapterFile, other: AdapterFile) -> dict[str, Any]:
    """The conflicts between two adapters, strongest first, on the sides of layers that both have.

    Raises:
        EtherFileError: a layer has different widths in the two.
        ValueError: one of them does not name its component and the other does.
    """
    if (None in adapter.configs) != (None in other.configs):
        unnamed = adapter if None in adapter.configs else other
        raise ValueError(f"{unnamed.source} does not say which component it adapts; --base tells, if it fits")
    ours, theirs = transforms_of(adapter), transforms_of(other)
    rows = []
    for side in [side for side in ours if side in theirs]:
        try:
            found = conflict(ours[side], theirs[side])
        except ValueError as error:
            raise EtherFileError(f"{other.source}: {side[1]} is not as in {adapter.source}: {error}") from error
        rows.append(_name_side(side) | found._asdict())
    rows.sort(key=lambda row: -row["alignment"])
    return {"file": other.source, "sides": len(ours), "sides_of_other": len(theirs), "conflicts": rows}
