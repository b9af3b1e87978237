"""An adapter for each row of a batch, on the layers of a pipeline that has none attached."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ether_diffusion.adapters.components import PEFT_MODELS, models_of, names_of, records_of
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.errors import InputError
from ether_diffusion.serving.composition import Composition, Layout, Row
from ether_diffusion.serving.host_adapter import HostAdapter, compose, from_ether_file
from ether_diffusion.serving.lora_file import find_lora_file, read_lora
from ether_diffusion.serving.mixing import add_convolution, add_linear
from ether_diffusion.tuner.flattened import flattened_modules

__all__ = ["AdapterRows", "HostAdapter"]


class AdapterRows:
    """Rows of a table that hold adapters, and forwards in which each sample has the adapters of one row.

    Row 0 is always "no adapter", and bitwise the base model at the same shape of the batch. A sample is the same, bit
    for bit, whatever the other samples of its batch have.

    Args:
        pipe: without adapters attached. Attach none, fuse no projections and compile nothing before `close`.
        max_rows: rows beside row 0.

    Raises:
        InputError: a pipeline with adapters, fused ones or a control encoder, or a compiled component.
    """

    def __init__(self, pipe: DiffusionPipeline, *, max_rows: int) -> None:
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise InputError(f"max_rows={max_rows!r}: a positive whole number fits")
        _check_bare(pipe)
        self.max_rows = max_rows
        self._pipe: DiffusionPipeline | None = pipe
        self._models, self._names = models_of(pipe), names_of(pipe)
        self._flattened = {module for model in self._models.values() for module in flattened_modules(model)}
        self._layouts = {component: Layout() for component in self._models}
        self._rows: dict[int, Row] = {0: Row({})}
        self._hooks: dict[tuple[str, str], RemovableHandle] = {}
        self._composed: dict[str, tuple[tuple[int, ...], Composition]] = {}  # the last of each component
        self._current = threading.local()  # a file may be read through the same layers meanwhile

    def read(self, adapter_file_or_folder: str | Path) -> HostAdapter:
        """Read an adapter, ETHER or LoRA, and check it against the pipeline, which stays as it is.

        Raises:
            FileNotFoundError, OSError, ValueError: as `load_ether_weights`; or a file that holds more than one row of
                a batch can have (replaced modules, a control encoder).
        """
        pipe = self._open()
        if (lora := find_lora_file(adapter_file_or_folder)) is not None:
            return read_lora(pipe, lora)
        return from_ether_file(pipe, find_adapter_file(adapter_file_or_folder))

    def assign(self, row: int, adapters: Sequence[tuple[HostAdapter, float]]) -> None:
        """Let a row hold adapters at their strengths, composed in their order as on a pipeline; replaces what it held.

        Raises:
            InputError: no such row, or a strength that is no finite number.
        """
        pipe = self._open()
        self._check_row(row)
        for adapter, strength in adapters:
            if not math.isfinite(strength):
                raise InputError(f"{adapter.source}: strength {strength!r}; a finite number fits")
        composed = compose(pipe, adapters)
        held = {component: self._layouts[component].row(pairs) for component, pairs in composed.items()}
        devices = {component: _device_of(self._models[component], pipe) for component in held}
        placed = Row({component: own.to(devices[component]) for component, own in held.items()})
        for component, pairs in composed.items():
            for path in pairs:
                self._hook(component, path)
        self._replace(row, placed)

    def clear(self, row: int) -> None:
        """Let a row hold nothing; a forward cannot ask for it until it is assigned again. Raises as `assign`."""
        self._open()
        self._check_row(row)
        self._replace(row, None)

    def _replace(self, row: int, held: Row | None) -> None:
        for component, (indices, _) in list(self._composed.items()):
            if row in indices:
                del self._composed[component]
        self._rows.pop(row, None)
        if held is not None:
            self._rows[row] = held

    @contextmanager
    def rows(self, component: str, indices: Sequence[int]) -> Iterator[None]:
        """Within, in this thread, sample i of a forward of the component has the adapters of row indices[i].

        Raises:
            InputError: no such component, no such row, or one that holds nothing. In the forward: a batch of another
                size than indices.
        """
        self._open()
        if component not in self._names:
            raise InputError(f"component={component!r}: this pipeline has {', '.join(self._models)}")
        component = self._names[component]
        if missing := sorted({index for index in indices if index not in self._rows}):
            raise InputError(
                f"row {missing[0]} holds no adapters; those that do are {', '.join(map(str, sorted(self._rows)))}"
            )
        active = self._current.__dict__
        before = active.get(component)
        active[component] = self._composition(component, indices)
        try:
            yield
        finally:
            active[component] = before

    def _composition(self, component: str, indices: Sequence[int]) -> Composition | None:
        """The factors of these rows; None where none of them changes the component."""
        key = tuple(index if component in self._rows[index].components else 0 for index in indices)
        if not any(key):
            return None
        if component not in self._composed or self._composed[component][0] != key:
            self._composed.pop(component, None)  # its memory is free before the new one takes as much
            held = [self._rows[index].components.get(component) for index in key]
            self._composed[component] = key, Composition(self._layouts[component], held)
        return self._composed[component][1]

    def close(self) -> None:
        """Take everything off the pipeline, which is bit for bit as before. A second call does nothing."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._rows.clear()
        self._composed.clear()
        self._pipe = None

    def _open(self) -> DiffusionPipeline:
        if self._pipe is None:
            raise InputError("these rows were closed: make others")
        return self._pipe

    def _check_row(self, row: int) -> None:
        if isinstance(row, bool) or not isinstance(row, int) or not 1 <= row <= self.max_rows:
            raise InputError(f"row={row!r}: 1 to {self.max_rows} fit")

    def _hook(self, component: str, path: str) -> None:
        if (component, path) not in self._hooks:
            layer = self._models[component].get_submodule(path)
            hook = layer.register_forward_hook(partial(self._changed, component, path), with_kwargs=True)
            self._hooks[component, path] = hook

    def _changed(
        self, component: str, path: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        """The output of a layer with the adapters of the rows; None leaves it untouched."""
        composition: Composition | None = self._current.__dict__.get(component)
        if composition is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != composition.size and (layer not in self._flattened or len(x) % composition.size):
            raise InputError(
                f"{component}.{path}: a batch of {len(x)}, but adapters were given for {composition.size} rows"
            )
        add: Callable = partial(add_convolution, layer=layer) if isinstance(layer, nn.Conv2d) else add_linear
        for change in composition.passes(path, y.device, y.dtype):
            y = add(x.to(y.dtype), y, change)
        return y


def _device_of(model: nn.Module, pipe: DiffusionPipeline) -> torch.device:
    device = next(model.parameters()).device
    return pipe._execution_device if device.type == "meta" else device


def _check_bare(pipe: DiffusionPipeline) -> None:
    for component, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if isinstance(part, PEFT_MODELS) or any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise InputError(f"{component} has adapters attached or fused: unload them first; rows bring their own")
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise InputError(f"{component} is compiled, and would not see that its rows change: use it uncompiled")
    for name, record in records_of(pipe).items():
        what = "replaced modules" if record.replaced else "a control encoder"
        raise InputError(f"the pipeline holds {what} of the adapter {name!r}: unload_ether_weights first")
