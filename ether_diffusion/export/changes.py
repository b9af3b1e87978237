"""What adapters change in the weights of a pipeline: exactly of low rank, so a LoRA can hold all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ether_diffusion.adapters.components import ether_layers, models_of, named, names_of, records_of
from ether_diffusion.adapters.schema import canonical_path
from ether_diffusion.analysis.weights import conflict, transform_of
from ether_diffusion.export.lora_files import Factors
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import Adaptation, Vectors, adapt_weight, low_rank_delta

# Axes: o outputs and i inputs of a weight, k positions of its kernel, r the rank of a change.


def stacked_delta(weight: Tensor, adapters: Sequence[Adaptation]) -> Factors:
    """Exact factors of what adapters do to a weight one after the other.

    With W_j = adapt(W_{j−1}) the sum telescopes, W_m − W_0 = Σ_j (W_j − W_{j−1}) = Σ_j B_j A_j, so the factors of the
    steps side by side are the factors of the whole. They are then rewritten with orthonormal rows A: terms may nearly
    cancel (ETHER+ near its start has v̂ ≈ −û).

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
    return orthonormal(torch.cat([step[0] for step in steps]), torch.cat([step[1] for step in steps], 1))


def orthonormal(down: Tensor, up: Tensor) -> Factors:
    """The product of factors (r, i·k) and (o, r) as one of the rank min(r, o, i·k), with orthonormal rows of `down`.

    In float64: what nearly cancels has done so before the factors are rounded.
    """
    down, up = down.double(), up.double()
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


def changes_of(
    pipe: DiffusionPipeline,
    adapter_names: Sequence[str] | str | None = None,
    *,
    with_encoder: str | None = None,
) -> list[Change]:
    """The change of every layer that the named adapters act on, at their present strengths.

    Args:
        adapter_names: in the order in which they act. Default: the active adapters.
        with_encoder: an adapter whose control encoder is written elsewhere, so there may be no change at all.

    Raises:
        ValueError: an unknown adapter, none that acts, a quantised or offloaded weight, or another method's adapter
            on the pipeline.
    """
    check_alone(pipe, with_encoder)
    known = records_of(pipe)
    adapter_names = None if adapter_names is None else named(adapter_names, known)
    changes = [
        _change(component, path, layer, acting)
        for component, path, layer in _layers(pipe)
        if (acting := _acting(layer, adapter_names))
    ]
    if not changes and with_encoder is None:
        raise _nothing("export", adapter_names or known)
    return changes


def check_acting(pipe: DiffusionPipeline, verb: str, adapter_names: Sequence[str] | None) -> None:
    """Raise where none of the named adapters (default: the active ones) changes a layer.

    Raises:
        ValueError: says what to do; or an unknown adapter.
    """
    known = records_of(pipe)
    adapter_names = None if adapter_names is None else named(adapter_names, known)
    if not any(_acting(layer, adapter_names) for _, _, layer in _layers(pipe)):
        raise _nothing(verb, adapter_names or known)


def _layers(pipe: DiffusionPipeline) -> Iterator[tuple[str, str, EtherLayer]]:
    models = models_of(pipe)
    for component, first in names_of(pipe).items():  # a model under two names is written under both
        yield from ((component, path, layer) for path, layer in ether_layers(models[first]))


def _acting(layer: EtherLayer, adapter_names: Sequence[str] | None) -> list[str]:
    wanted = layer.acting_adapters if adapter_names is None else adapter_names
    return [name for name in wanted if name in layer.ether_u and layer.scaling[name] != 0]


def _nothing(verb: str, names: Iterable[str]) -> ValueError:
    if not names:
        return ValueError(f"nothing to {verb}: this pipeline holds no ETHER adapter: load one first")
    return ValueError(
        f"nothing to {verb}: none of {', '.join(names)} acts: switch on what is meant (enable_ether, set_adapters), "
        "at a strength other than 0"
    )


def check_alone(pipe: DiffusionPipeline, with_encoder: str | None = None) -> None:
    """Raise where the pipeline holds what a LoRA or merged weights have no place for, beside ETHER's vectors.

    That is adapters of another method, whose modules would be written as they are, and what control training leaves
    besides: replaced modules, or an encoder that is in use, without which the adapter is not what was trained.

    with_encoder: an adapter whose encoder is not lost.

    Raises:
        ValueError: with the adapters' names and components.
    """
    for name, record in records_of(pipe).items():
        has_encoder = record.control is not None and record.control.active and name != with_encoder
        if record.replaced or has_encoder:
            held = f"replaced modules of {', '.join(record.replaced)}" if record.replaced else "a control encoder"
            raise ValueError(
                f"{name}: holds {held}, which would be lost; only save_ether_weights writes them: delete it first "
                "(pipe.delete_adapters)"
            )
    for component, model in models_of(pipe).items():
        ours = {layer for _, layer in ether_layers(model)}
        others = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and layer not in ours]
        if others:
            names = dict.fromkeys(name for layer in others for name in layer._get_available_adapters())
            raise ValueError(
                f"{component}: holds an adapter of another method ({', '.join(names) or 'deleted, its layers stay'}), "
                "which cannot be written with ETHER's: delete it first (pipe.delete_adapters)"
            )


def _change(component: str, path: str, layer: EtherLayer, names: Sequence[str]) -> Change:
    try:
        weight = layer.plain_weight().detach().cpu()
    except ValueError as error:
        raise ValueError(f"{component}.{path}: {error}") from error
    adapters = {
        name: Adaptation(layer.vectors(name).map(lambda v: v.detach().cpu().double()), layer.scaling[name])
        for name in names
    }
    return Change(component, path, layer, weight, adapters)
