"""Export ETHER adapters as one LoRA, in the formats of PEFT, diffusers and kohya.

Nothing is approximated or trained. The LoRA is exact on the base weights it was computed from and on no others, so
every file records their fingerprint.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.fingerprint import base_model_name, fingerprint
from ether_diffusion.dtypes import DTYPES
from ether_diffusion.export.changes import Change, alignment, changes_of, relative_error, stacked_delta
from ether_diffusion.export.control import COMPONENT, FIRST_LAYER, Columns, control_columns, widened
from ether_diffusion.export.formats import DEFAULT_NAMES
from ether_diffusion.export.lora_files import (
    WRITERS,
    Key,
    Stored,
    diffusers_components,
    finish,
    gather_parts,
)
from ether_diffusion.export.names import UNREAD_BY_DIFFUSERS, Place, family_of, kohya_place, own_place
from ether_diffusion.files import new_path
from ether_diffusion.tuner.guards import FUSED_PROJECTION

RECORD = "ether_export"
"""The entry of a file's safetensors metadata that says, as JSON, what it was made from."""


@dataclass(frozen=True)
class Report:
    """What an export wrote, and what has to be known about it. As text: a few lines for people."""

    path: Path
    to: str
    dtype: str
    size: int  # bytes
    ranks: Mapping[str, int]  # by layer of the file
    errors: Mapping[str, float]  # by adapted layer: of its change, relative to that in float64
    conflicts: Mapping[tuple[str, str], tuple[float, str]]  # two adapters -> the largest, and its layer
    strengths: Mapping[str, list[float]]  # by adapter: those of its layers
    erases: bool  # an adapter is ETHER, whose reflection erases û halfway
    unread: bool = False  # by diffusers, which has no reader for this format of this family
    has_columns: bool = False  # of the first layer, which see a control image

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        worst = max(self.errors, key=self.errors.__getitem__)
        lines = [
            f"{self.path}: {self.to}, {self.dtype}, {self.size:,} bytes, {len(self.ranks)} layers of rank "
            f"{low if low == high else f'{low} to {high}'}",
            f"largest relative error of a layer's change: {self.errors[worst]:.1e} ({worst})",
        ]
        for name, values in self.strengths.items():
            lines.append(f"{name}: strength {', '.join(f'{value:g}' for value in values)}")
        for (first, second), (value, layer) in self.conflicts.items():
            lines.append(
                f"conflict of {first} and {second}: max |û_a·û_b| = {value:.2f} ({layer}); this file holds their "
                "composition, exactly"
            )
        if self.unread:
            lines.append(
                f"diffusers has no reader for {self.to} of this family: load_lora_weights would pass over this file; "
                "export to diffusers-lora for it"
            )
        if self.has_columns:
            lines.append(
                "the first layer has new columns, which see the control image: load_lora_weights of diffusers' "
                "FluxControlPipeline widens it"
            )
        lines.append(
            "two exported adapters add instead of composing, the more wrongly the larger max |û_a·û_b|: export "
            "together what is used together"
        )
        meaning = "is ETHER's strength" if len(self.strengths) == 1 else "scales their change as a whole"
        if self.erases:
            norms = "ETHER keeps norms at strengths 0 and 1 alone, and at 0.5 erases û, the direction that it reflects"
        else:
            norms = "ETHER+ keeps norms at strength 0 alone"
        lines.append(f"the LoRA's weight {meaning}. {norms}")
        return "\n".join(lines)


def export_lora(
    pipe: DiffusionPipeline,
    output_dir: str | Path,
    *,
    to: str,
    adapter_names: Sequence[str] | str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    weight_name: str | None = None,
) -> Report:
    """Write ETHER adapters of a pipeline, composed and at their present strengths, as one LoRA.

    On FLUX.1, "diffusers-lora" also holds a control encoder of latents, for diffusers' `FluxControlPipeline`.

    Args:
        output_dir: peft-lora: a new folder, with a folder per component. Else: the folder of the file.
        to: "peft-lora", "diffusers-lora" (for `load_lora_weights`) or "kohya" (for sd-scripts, ComfyUI, A1111-likes).
        adapter_names: in the order in which they act. Default: the active adapters.
        rank: of every layer, filled up with zeros. Default: each layer's exact rank.
        dtype: of the file: float32, float16 or bfloat16. The change is computed in float64 and rounded once.
        weight_name: of the file. Default: by format.

    Raises:
        ValueError: nothing to export, a layer that the format has no name for, a rank that is too small, or a change
            that the dtype cannot hold.
        FileExistsError: there is something under that name; nothing is overwritten.
    """
    if to not in WRITERS:
        raise ValueError(f"to={to!r}: there are {', '.join(WRITERS)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: there are {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: a whole number of at least 1, or None for each layer's exact rank")
    target = _target(Path(output_dir), to, weight_name)
    with new_path(target) as partial:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        columns = control_columns(pipe, to, names)
        changes = changes_of(pipe, names, with_encoder=None if columns is None else columns.adapter)
        places = [_place(pipe, change, to) for change in changes]
        keys = [(change.component, place.name) for change, place in zip(changes, places, strict=True)]
        factors = [stacked_delta(change.weight, list(change.adapters.values())) for change in changes]
        layers = gather_parts(list(zip(keys, places, factors, strict=True)))
        inputs = {key: tuple(change.weight.shape[1:]) for key, change in zip(keys, changes, strict=True)}
        if columns is not None:
            first = COMPONENT, FIRST_LAYER
            layers[first], inputs[first] = widened(layers.get(first), columns), (2 * columns.weight.shape[1],)
        stored = finish(
            layers,
            inputs,
            rank=rank,
            dtype=dtype,
            one_alpha=to == "kohya",
        )
        strengths, dtype_name = _strengths(changes, columns), str(dtype).removeprefix("torch.")
        record = _record(pipe, changes, strengths, dtype_name)
        WRITERS[to](partial, pipe, stored, {RECORD: json.dumps(record, sort_keys=True)})
        return Report(
            path=target,
            to=to,
            dtype=dtype_name,
            size=sum(file.stat().st_size for file in (partial, *partial.rglob("*")) if file.is_file()),
            ranks={".".join(key): len(layer.down) for key, layer in stored.items()},
            errors=_errors(stored, changes, keys, places) | _errors_of_columns(stored, columns),
            conflicts=_conflicts(changes),
            strengths=strengths,
            erases=any(each.vectors.v is None for change in changes for each in change.adapters.values()),
            unread=to == "kohya" and family_of(models_of(pipe)) in UNREAD_BY_DIFFUSERS,
            has_columns=columns is not None,
        )


def _target(output_dir: Path, to: str, weight_name: str | None) -> Path:
    if to not in DEFAULT_NAMES:
        if weight_name is not None:
            raise ValueError(f"weight_name={weight_name!r}: {to} is a folder per component, whose files PEFT names")
        return output_dir
    name = weight_name or DEFAULT_NAMES[to]
    if Path(name).name != name or Path(name).suffix != ".safetensors":
        raise ValueError(f"weight_name={name!r} is not the name of a .safetensors file; e.g. {DEFAULT_NAMES[to]}")
    return output_dir / name


def _place(pipe: DiffusionPipeline, change: Change, to: str) -> Place:
    """Where a format holds a layer.

    Raises:
        ValueError: it does not; names the layer or component, and the formats that do.
    """
    held = diffusers_components(pipe)
    if to == "kohya":
        try:
            return kohya_place(models_of(pipe), change.component, change.path)
        except ValueError as error:
            fits = "diffusers-lora and peft-lora hold it" if change.component in held else "peft-lora holds it"
            raise ValueError(f"{error}; {fits}") from error
    if to == "diffusers-lora":
        if change.component not in held:
            raise ValueError(
                f"{change.component}: a LoRA file of diffusers' {type(pipe).__name__} holds "
                f"{', '.join(held) or 'nothing'}; peft-lora fits every component"
            )
        if FUSED_PROJECTION.fullmatch(change.path.rpartition(".")[2]):
            raise ValueError(
                f"{change.component}.{change.path} is a projection that fuse_qkv_projections made, which a pipeline "
                "does not have when it is loaded: adapt the layers that it was made of (unfuse_qkv_projections)"
            )
    # PEFT takes the paths that the model has here, diffusers those that every release understands.
    return own_place(change.path if to == "peft-lora" else change.canonical, change.layer)


def _record(
    pipe: DiffusionPipeline, changes: Sequence[Change], strengths: Mapping[str, list[float]], dtype_name: str
) -> dict[str, Any]:
    """What a file says of where it comes from."""
    return {
        "adapters": [{"name": name, "strengths": values} for name, values in strengths.items()],
        "base_model": base_model_name(pipe),
        "base_fingerprint": _fingerprints(changes),
        "dtype": dtype_name,
        "versions": {name: version(name) for name in ("ether-diffusion", "diffusers", "peft", "torch")},
    }


def _errors(
    stored: Mapping[Key, Stored], changes: Sequence[Change], keys: Sequence[Key], places: Sequence[Place]
) -> dict[str, float]:
    """The relative error of each layer's change, as it is stored."""
    errors = {}
    for change, key, place in zip(changes, keys, places, strict=True):
        found = stored[key].change(place.rows)[:, : change.weight[0].numel()]
        errors[f"{change.component}.{change.canonical}"] = change.error_of(found)
    return errors


def _errors_of_columns(stored: Mapping[Key, Stored], columns: Columns | None) -> dict[str, float]:
    """The relative error of the columns that see a control image, if there are any."""
    if columns is None:
        return {}
    outputs, inputs = columns.weight.shape
    found = stored[COMPONENT, FIRST_LAYER].change(slice(outputs))[:, inputs:]
    return {"control_encoder": relative_error(found, columns.weight, columns.weight)}


def _strengths(changes: Sequence[Change], columns: Columns | None) -> dict[str, list[float]]:
    found: dict[str, set[float]] = {} if columns is None else {columns.adapter: {columns.strength}}
    for change in changes:
        for name, adaptation in change.adapters.items():
            found.setdefault(name, set()).add(adaptation.strength)
    return {name: sorted(values) for name, values in found.items()}


def _fingerprints(changes: Sequence[Change]) -> dict[str, dict[str, str]]:
    weights: dict[str, dict[str, Tensor]] = {}
    for change in changes:
        weights.setdefault(change.component, {})[change.canonical] = change.weight
    return {component: fingerprint(found) for component, found in weights.items()}


def _conflicts(changes: Sequence[Change]) -> dict[tuple[str, str], tuple[float, str]]:
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for change in changes:
        for first, second in itertools.combinations(change.adapters, 2):
            value = alignment(change.adapters[first].vectors, change.adapters[second].vectors)
            if value >= found.get((first, second), (0.0, ""))[0]:
                found[first, second] = value, f"{change.component}.{change.canonical}"
    return found
