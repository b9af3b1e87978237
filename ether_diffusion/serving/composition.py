"""The factors of a batch's rows, gathered once for all forwards of the same composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ether_diffusion.serving.host_adapter import Pair
from ether_diffusion.serving.mixing import Pass, padded_rank

# Axes: b rows, i inputs and o outputs of a layer, k positions of its kernel, R a padded rank, D numbers of a row.


class Slot(NamedTuple):
    """Where a layer's factors are in the numbers of a row: R·i·k of the first, then R·o of the second."""

    start: int
    inputs: int  # i·k
    outputs: int  # o


@dataclass
class Held:
    """What a row holds for one component.

    flat: R -> (D,), the factors of the layers with this padded rank; zeros for layers that have another.
    ranks: module path -> R, of the layers that it changes.
    """

    flat: dict[int, Tensor]
    ranks: dict[str, int]

    def to(self, device: torch.device) -> Held:
        return Held({rank: flat.to(device) for rank, flat in self.flat.items()}, self.ranks)


class Row(NamedTuple):
    """What a row holds, by component."""

    components: Mapping[str, Held]


@dataclass
class Layout:
    """Where the layers of a component are in the numbers of a row: R -> module path -> place; it only grows.

    sizes: R -> D.
    """

    slots: dict[int, dict[str, Slot]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def row(self, pairs: Mapping[str, Pair]) -> Held:
        """Factors of layers by path, as a row holds them."""
        ranks = {path: padded_rank(up.shape[0]) for path, (_, up) in pairs.items()}
        for path, (down, up) in pairs.items():
            self._place(path, ranks[path], len(down), up.shape[1])
        dtype = next(iter(pairs.values()))[0].dtype
        flat = {rank: torch.zeros(self.sizes[rank], dtype=dtype) for rank in set(ranks.values())}
        for path, (down, up) in pairs.items():
            place = views(flat[ranks[path]], self.slots[ranks[path]][path], ranks[path])
            place[0][: down.shape[1]] = down.T
            place[1][: up.shape[0]] = up
        return Held(flat, ranks)

    def _place(self, path: str, rank: int, inputs: int, outputs: int) -> None:
        slots = self.slots.setdefault(rank, {})
        if path not in slots:
            slots[path] = Slot(self.sizes.get(rank, 0), inputs, outputs)
            self.sizes[rank] = slots[path].start + rank * (inputs + outputs)


def views(flat: Tensor, slot: Slot, rank: int) -> tuple[Tensor, Tensor]:
    """A layer's factors (…, R, i·k) and (…, R, o) in the numbers (…, D) of rows."""
    middle = slot.start + rank * slot.inputs
    down, up = flat[..., slot.start : middle], flat[..., middle : middle + rank * slot.outputs]
    return down.unflatten(-1, (rank, slot.inputs)), up.unflatten(-1, (rank, slot.outputs))


class Composition:
    """The factors of the rows of a batch.

    held: for each row what it holds for the component, or None.

    Attributes:
        size: rows.
    """

    def __init__(self, layout: Layout, held: Sequence[Held | None]) -> None:
        self.size = len(held)
        self._layout, self._held = layout, held
        self._flat: dict[tuple, Tensor] = {}
        self._passes: dict[tuple, list[Pass]] = {}

    def passes(self, path: str, device: torch.device, dtype: torch.dtype) -> list[Pass]:
        """What is to be added in a layer, for each padded rank that a row has there."""
        key = (path, device, dtype)
        if key not in self._passes:
            self._passes[key] = self._make(path, device, dtype)
        return self._passes[key]

    def _make(self, path: str, device: torch.device, dtype: torch.dtype) -> list[Pass]:
        made = []
        for rank in sorted({held.ranks[path] for held in self._held if held is not None and path in held.ranks}):
            has = [held is not None and held.ranks.get(path) == rank for held in self._held]
            flat = self._gathered(rank, device, dtype)
            of = None if all(has) else torch.tensor(has, device=device)[:, None, None]
            made.append(Pass(*views(flat, self._layout.slots[rank][path], rank), of))
        return made

    def _gathered(self, rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(b, D): the numbers of every row, zeros for one without any of this padded rank."""
        if (rank, device, dtype) not in self._flat:
            size = self._layout.sizes[rank]
            own = [None if held is None else held.flat.get(rank) for held in self._held]
            gathered = torch.zeros(self.size, size, device=device, dtype=dtype)
            for k, flat in enumerate(own):
                if flat is not None:  # one that was made before the layout grew is shorter
                    gathered[k, : len(flat)] = flat
            self._flat[rank, device, dtype] = gathered
        return self._flat[rank, device, dtype]
