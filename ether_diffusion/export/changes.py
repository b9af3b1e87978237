"""ETHER adapters as LoRA files (PEFT's, diffusers', kohya's), and pipelines with adapters merged.

The change that adapters make to a weight is exactly of low rank, so a LoRA can hold all of it: nothing is approximated
or trained. It is exact on the base weights it was computed from and on no others, so every file records their
fingerprint.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.attach import (
    adapters_of,
    attach,
    base_model_name,
    ether_layers,
    fingerprint,
    models_of,
    other_base,
)
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, canonical_path
from ether_diffusion.analysis.weights import conflict, transform_of
from ether_diffusion.export.kohya import Place, kohya_place, whole
from ether_diffusion.export.lora_files import DEFAULT_NAMES, WRITERS, Factors, finish, gather_parts
from ether_diffusion.files import new_path
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import Adaptation, Vectors, adapt_weight, low_rank_delta

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECORD = "ether_export"
"""The entry of a file's safetensors metadata that says, as JSON, what it was made from."""

# The change of a layer: o outputs and i inputs of a weight, k positions of its kernel, r the rank of a change -----


def stacked_delta(weight: Tensor, adapters: Sequence[Adaptation]) -> Factors:
    """Exact factors of what adapters do to a weight one after the other.

    With W_j = adapt(W_{j−1}) the sum telescopes, W_m − W_0 = Σ_j (W_j − W_{j−1}) = Σ_j B_j A_j, so the factors of the
    steps side by side are the factors of the whole. They are then rewritten with orthonormal rows A, by a QR
    decomposition in float64: where terms nearly cancel (ETHER+ near its start has v̂ ≈ −û), they have to do so before
    B and A are rounded.

    Args:
        weight: (o, i) or (o, i, *kernel).
        adapters: in the order in which they act.

    Returns:
        (r, i·k) and (o, r), with r the sum of the steps' ranks, at most min(o, i·k).
    """
    weight, steps = weight.double(), []
    for adaptation in adapters:
        steps.append(low_rank_delta(weight, *adaptation))
        weight = adapt_weight(weight, *adaptation)
    down, up = torch.cat([step[0] for step in steps]), torch.cat([step[1] for step in steps], 1)
    if len(down) > len(up):
        up, triangle = torch.linalg.qr(up)
        down = triangle @ down
    columns, triangle = torch.linalg.qr(down.T)
    return Factors(columns.T, up @ triangle.T)


def dense_delta(weight: Tensor, adapters: Sequence[Adaptation]) -> Tensor:
    """W_m − W_0 of the same adapters by the definition of the adapted weight: (o, i·k) in float64."""
    adapted = weight.double()
    for adaptation in adapters:
        adapted = adapt_weight(adapted, *adaptation)
    return (adapted - weight.double()).flatten(1)


def relative_error(found: Tensor, exact: Tensor, weight: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, Frobenius norms; a change below 1e-12 of the weight counts as one of that size."""
    difference, size, whole_size = (
        torch.linalg.vector_norm(x.double()).item() for x in (found - exact, exact, weight)
    )
    return difference / max(size, 1e-12 * whole_size) if difference else 0.0


def alignment(first: Vectors, second: Vectors) -> float:
    """max |û_a·û_b| over the directions that two adapters of one layer have on the same side, v̂ included.

    At 0, adapters of the input side commute, and their changes add up to their composition; at 1 they share a
    direction.

    first, second: each with its own number of blocks.
    """
    shared = zip(first.sides(), second.sides(), strict=False)  # the output side only where both have one
    return max(conflict(transform_of(*one), transform_of(*other)).alignment for one, other in shared)


@dataclass(frozen=True)
class Change:
    """What the exported adapters do to one layer."""

    component: str
    path: str
    layer: EtherLayer
    weight: Tensor  # without them
    adapters: Mapping[str, Adaptation]  # by name, in the order in which they act

    @property
    def canonical(self) -> str:
        return canonical_path(self.component, self.path)

    def error_of(self, found: Tensor) -> float:
        """The relative error of a change (o, i·k) that a file holds."""
        return relative_error(found, dense_delta(self.weight, list(self.adapters.values())), self.weight)


def changes_of(pipe: DiffusionPipeline, adapter_names: Sequence[str] | None = None) -> list[Change]:
    """The change of every layer that the named adapters act on, at their present strengths.

    Args:
        adapter_names: in the order in which they act. Default: the active adapters.

    Raises:
        ValueError: an unknown adapter, none that acts, a quantised or offloaded weight, or another method's adapter
            below one of these.
    """
    known = adapters_of(pipe)
    if unknown := sorted(set(adapter_names or ()) - set(known)):
        raise ValueError(f"there is no adapter {', '.join(unknown)}; loaded are {', '.join(known) or 'none'}")
    changes = []
    for component, model in models_of(pipe).items():
        for path, layer in ether_layers(model):
            wanted = layer.acting_adapters if adapter_names is None else adapter_names
            if acting := [name for name in wanted if name in layer.ether_u and layer.scaling[name] != 0]:
                changes.append(_change(component, path, layer, acting))
    if not changes:
        raise ValueError(f"nothing to export: of {', '.join(adapter_names or known) or 'no adapters'} none acts")
    return changes


def _change(component: str, path: str, layer: EtherLayer, names: Sequence[str]) -> Change:
    if isinstance(layer.base_layer, BaseTunerLayer):
        raise ValueError(
            f"{component}.{path}: an adapter of another method ({type(layer.base_layer).__name__}) lies below ETHER, "
            "which would reflect it too: unload it first"
        )
    try:
        weight = layer._plain_weight().detach().cpu()
    except ValueError as error:
        raise ValueError(f"{component}.{path}: {error}") from error
    adapters = {
        name: Adaptation(layer.vectors(name).map(lambda v: v.detach().cpu().double()), layer.scaling[name])
        for name in names
    }
    return Change(component, path, layer, weight, adapters)


# Exporting --------------------------------------------------------------------------------------------------------


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
    adapter_names: Sequence[str] | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    weight_name: str | None = None,
) -> Report:
    """Write ETHER adapters of a pipeline, composed and at their present strengths, as one LoRA.

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
        changes = changes_of(pipe, adapter_names)
        places = [_place(pipe, change, to) for change in changes]
        keys = [(change.component, place.name) for change, place in zip(changes, places, strict=True)]
        factors = [stacked_delta(change.weight, list(change.adapters.values())) for change in changes]
        stored = finish(
            gather_parts(list(zip(keys, places, factors, strict=True))),
            {key: tuple(change.weight.shape[1:]) for key, change in zip(keys, changes, strict=True)},
            rank=rank,
            dtype=dtype,
            one_alpha=to == "kohya",
        )
        strengths, dtype_name = _strengths(changes), str(dtype).removeprefix("torch.")
        record = {
            "adapters": [{"name": name, "strengths": values} for name, values in strengths.items()],
            "base_model": base_model_name(pipe),
            "base_fingerprint": _fingerprints(changes),
            "dtype": dtype_name,
            "versions": {name: version(name) for name in ("ether-diffusion", "diffusers", "peft", "torch")},
        }
        WRITERS[to](partial, pipe, stored, {RECORD: json.dumps(record, sort_keys=True)})
        return Report(
            path=target,
            to=to,
            dtype=dtype_name,
            size=sum(file.stat().st_size for file in (partial, *partial.rglob("*")) if file.is_file()),
            ranks={".".join(key): len(layer.down) for key, layer in stored.items()},
            errors={
                f"{change.component}.{change.canonical}": change.error_of(stored[key].change(place.rows))
                for change, key, place in zip(changes, keys, places, strict=True)
            },
            conflicts=_conflicts(changes),
            strengths=strengths,
            erases=any(each.vectors.v is None for change in changes for each in change.adapters.values()),
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
    if to == "kohya":
        return kohya_place(models_of(pipe), change.component, change.path)
    # PEFT takes the paths that the model has here, diffusers those that every release understands.
    return whole(change.path if to == "peft-lora" else change.canonical, change.layer)


def _strengths(changes: Sequence[Change]) -> dict[str, list[float]]:
    found: dict[str, set[float]] = {}
    for change in changes:
        for name, adaptation in change.adapters.items():
            found.setdefault(name, set()).add(adaptation.strength)
    return {name: sorted(values) for name, values in found.items()}


def _fingerprints(changes: Sequence[Change]) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, EtherLayer]] = {}
    for change in changes:
        layers.setdefault(change.component, {})[change.canonical] = change.layer
    return {component: fingerprint(found) for component, found in layers.items()}


def _conflicts(changes: Sequence[Change]) -> dict[tuple[str, str], tuple[float, str]]:
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for change in changes:
        for first, second in itertools.combinations(change.adapters, 2):
            value = alignment(change.adapters[first].vectors, change.adapters[second].vectors)
            if value >= found.get((first, second), (0.0, ""))[0]:
                found[first, second] = value, f"{change.component}.{change.canonical}"
    return found


# From files to files ----------------------------------------------------------------------------------------------


def open_adapted(
    base: str | Path,
    adapters: Sequence[str | Path],
    scales: Sequence[float] = (1.0,),
    *,
    allow_other_base: bool = False,
) -> tuple[DiffusionPipeline, list[str]]:
    """Load a base pipeline in float32 and put adapters on it, one after the other.

    Args:
        base: a folder, or an id on the Hub.
        adapters: files, folders or ids, in the order in which they act.
        scales: their strengths, or one for all.
        allow_other_base: go on where an adapter says that it was trained on other weights.

    Returns:
        The pipeline, on which the adapters are active, and their names.

    A file without a fingerprint of its base, such as PEFT's, cannot be checked, which is logged as a warning.

    Raises:
        OSError: the base or an adapter cannot be found.
        ValueError: an adapter that does not fit the base, or was trained on other weights.
    """
    if len(scales) not in (1, len(adapters)):
        raise ValueError(f"{len(adapters)} adapters, but {len(scales)} strengths: one for each, or one for all")
    checkpoints = [find_adapter_file(adapter) for adapter in adapters]  # before the base, which takes longer
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    names = [_label(number, adapter) for number, adapter in enumerate(adapters, 1)]
    for name, checkpoint in zip(names, checkpoints, strict=True):
        attach(pipe, checkpoint, name)
        if not checkpoint.metadata.get("base_fingerprint"):
            logger.warning("%s does not say which weights it was trained on: not checked", checkpoint.source)
        differing = other_base(pipe, name, checkpoint.metadata)
        if differing and not allow_other_base:
            raise ValueError(
                f"{checkpoint.source} was trained on other weights than those of {', '.join(differing)} in {base} "
                f"(its base model: {checkpoint.metadata.get('base_model') or 'unknown'}); to use it on these all the "
                "same, allow another base (--allow_other_base)"
            )
    pipe.set_adapters(names, list(scales) * (len(names) if len(scales) == 1 else 1))
    return pipe, names


def _label(number: int, adapter: str | Path) -> str:
    """A name for an adapter: that of its file or folder, numbered, in letters that a name may have."""
    path = Path(adapter)
    stem = path.resolve().parent.name if path.name == WEIGHTS_NAME else path.name.removesuffix(".safetensors")
    return f"{number}_{re.sub(r'[^0-9A-Za-z_-]+', '_', stem)}"


def merge_adapters(
    pipe: DiffusionPipeline,
    output_dir: str | Path,
    *,
    adapter_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the whole pipeline with adapters merged into its weights: a stock pipeline, which needs no ETHER to open.

    The pipeline passed in is left with merged weights, in `dtype`, and without adapters.

    Args:
        output_dir: a new folder.
        adapter_names: in the order in which they act. Default: the active adapters.
        dtype: of what is written, except for modules that a model declares to need float32.

    Raises:
        ValueError: nothing to merge, a quantised or offloaded weight, or NaN or infinity in a merged weight.
        FileExistsError: there is something under that name; nothing is overwritten.
    """
    with new_path(Path(output_dir)) as partial:
        pipe.fuse_ether(safe_fusing=True, adapter_names=adapter_names)
        layers = [layer for model in models_of(pipe).values() for _, layer in ether_layers(model) if layer.merged]
        merged = [(layer.get_base_layer(), layer.get_base_layer().weight.data) for layer in layers]
        pipe.unload_ether_weights()  # takes the adapters off, and brings the base weights back
        for base, weight in merged:
            base.weight.data = weight
        for model in models_of(pipe).values():
            _cast(model, dtype)
        pipe.save_pretrained(partial)
    return Path(output_dir)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a model saves, but for the modules that it declares to need float32."""
    exact, saved = set(getattr(model, "_keep_in_fp32_modules", None) or ()), model.state_dict().keys()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in saved and tensor.is_floating_point() and exact.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
