"""LoRA files: exact changes of layers, given as factors, in the formats of PEFT, diffusers and kohya.

Axes: o outputs and i inputs of a weight, k positions of its kernel, r the rank of a change.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ether_diffusion.adapters.fingerprint import base_model_name
from ether_diffusion.adapters.reading import PEFT_WEIGHTS_NAME
from ether_diffusion.export.formats import FORMATS
from ether_diffusion.export.names import Place

Key = tuple[str, str]  # of a layer in a file: component, name


class Factors(NamedTuple):
    """A change ΔW = up · down, in float64."""

    down: Tensor  # (r, i·k)
    up: Tensor  # (o, r)


class Stored(NamedTuple):
    """A layer as a file holds it: ΔW = (alpha / r) up · down."""

    down: Tensor  # (r, i, *kernel)
    up: Tensor  # (o, r, 1, …)
    alpha: int

    def change(self, rows: slice) -> Tensor:
        """The change that a reader computes, for some of the outputs: (rows, i·k) in float64."""
        up, down = self.up[rows].double().flatten(1), self.down.double().flatten(1)
        return self.alpha / len(down) * up @ down


def gather_parts(parts: Sequence[tuple[Key, Place, Factors]]) -> dict[Key, Factors]:
    """Factors of every layer of a file, from those of the model's layers that make it up.

    A layer of several parts (FLUX.1's q, k, v) gets the rows of all their A, and their B as blocks on the diagonal, in
    columns of one width: the smaller ranks, and parts without an adapter, are filled with zeros.
    """
    groups: dict[Key, list[tuple[Place, Factors]]] = {}
    for key, place, factors in parts:
        groups.setdefault(key, []).append((place, factors))
    gathered = {}
    for key, members in groups.items():
        widths, inputs = members[0][0].widths, members[0][1].down.shape[1]
        rank = max(len(factors.down) for _, factors in members)
        down = torch.zeros(len(widths) * rank, inputs, dtype=torch.float64)
        up = torch.zeros(sum(widths), len(widths) * rank, dtype=torch.float64)
        for place, factors in members:
            columns = slice(place.part * rank, place.part * rank + len(factors.down))
            down[columns], up[place.rows, columns] = factors
        gathered[key] = Factors(down, up)
    return gathered


def finish(
    layers: Mapping[Key, Factors],
    inputs: Mapping[Key, tuple[int, ...]],
    *,
    rank: int | None,
    dtype: torch.dtype,
    one_alpha: bool,
) -> dict[Key, Stored]:
    """Layers as they are stored: filled up to a rank, rounded once.

    Args:
        layers: their factors.
        inputs: their weights' shapes without the outputs, (i, *kernel).
        rank: of every layer, by rows and columns of zeros; None: each layer's own.
        dtype: of the file.
        one_alpha: one alpha for all, the rank that most layers have, for which B makes up; else each layer's rank.
            Diffusers' reader of kohya files gives a wrong scale to layers whose alpha is not that of most.

    Raises:
        ValueError: a rank below that of a layer, or a number that the dtype cannot hold.
    """
    ranks = {key: len(factors.down) for key, factors in layers.items()}
    largest = max(ranks, key=ranks.__getitem__)
    if rank is not None and rank < ranks[largest]:
        raise ValueError(
            f"rank {rank} is too small: {'.'.join(largest)} has the exact rank {ranks[largest]}, the largest of all; "
            f"{ranks[largest]} or more fits, or auto for each layer's own"
        )
    common = rank or statistics.mode(ranks.values())
    stored = {}
    for key, (down, up) in layers.items():
        own = rank or ranks[key]
        alpha = common if one_alpha else own
        down = torch.nn.functional.pad(down, (0, 0, 0, own - len(down))).to(dtype)
        up = torch.nn.functional.pad(up * (own / alpha), (0, own - up.shape[1])).to(dtype)
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"{'.'.join(key)}: the change does not fit into {dtype}; bfloat16 and float32 hold more")
        point = (1,) * (len(inputs[key]) - 1)  # a 1×1 kernel, where there is a kernel
        stored[key] = Stored(down.reshape(own, *inputs[key]), up.reshape(*up.shape, *point), alpha)
    return stored


# Formats: each writes to a path where there is nothing yet --------------------------------------------------------


def _by_component(stored: Mapping[Key, Stored]) -> dict[str, dict[str, Stored]]:
    components: dict[str, dict[str, Stored]] = {}
    for (component, name), layer in stored.items():
        components.setdefault(component, {})[name] = layer
    return components


def _config_fields(layers: Mapping[str, Stored], anchor: str) -> dict[str, Any]:
    """Fields of the LoraConfig of layers whose alpha is their rank.

    anchor: what patterns begin with; "^" keeps one from matching the end of a longer path.
    """
    ranks = {name: len(layer.down) for name, layer in layers.items()}
    common = statistics.mode(ranks.values())
    others = {anchor + name: rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(layers),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }


def write_peft(
    folder: Path, pipe: DiffusionPipeline, stored: Mapping[Key, Stored], metadata: Mapping[str, str]
) -> None:
    """A folder per component, as PEFT's `save_pretrained` writes it and `PeftModel.from_pretrained` reads it."""
    for component, layers in _by_component(stored).items():
        LoraConfig(
            **_config_fields(layers, "^"), base_model_name_or_path=base_model_name(pipe), inference_mode=True
        ).save_pretrained(folder / component)
        tensors = {}
        for name, layer in layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up
        save_file(tensors, folder / component / PEFT_WEIGHTS_NAME, {"format": "pt", **metadata})


def diffusers_components(pipe: DiffusionPipeline) -> list[str]:
    """The components that a LoRA file of the pipeline's own `save_lora_weights` holds."""
    write = getattr(pipe, "save_lora_weights", None)
    options = inspect.signature(write).parameters if write else ()
    return [name.removesuffix("_lora_layers") for name in options if name.endswith("_lora_layers")]


def write_diffusers(
    path: Path, pipe: DiffusionPipeline, stored: Mapping[Key, Stored], metadata: Mapping[str, str]
) -> None:
    """One file, by the pipeline's own `save_lora_weights`; our metadata is then added to diffusers'."""
    arguments: dict[str, Any] = {}
    for component, layers in _by_component(stored).items():
        in_text = component.startswith("text_encoder")
        down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if in_text else ("lora_A", "lora_B")
        tensors = {}
        for name, layer in layers.items():
            tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"] = layer.down, layer.up
        # Some releases of transformers have `text_model.` in the path: without it, and unanchored, a name fits in all.
        names = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
        arguments[f"{component}_lora_layers"] = tensors
        arguments[f"{component}_lora_adapter_metadata"] = _config_fields(names, "" if in_text else "^")
    pipe.save_lora_weights(path.parent, weight_name=path.name, **arguments)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | metadata)


def write_kohya(
    path: Path, pipe: DiffusionPipeline, stored: Mapping[Key, Stored], metadata: Mapping[str, str]
) -> None:
    """One file in the format of kohya's sd-scripts. Alpha is float32 in each: half precision rounds large ranks."""
    tensors = {}
    for (_, name), layer in stored.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
    save_file(tensors, path, {"format": "pt", **metadata})


Writer = Callable[[Path, DiffusionPipeline, Mapping[Key, Stored], Mapping[str, str]], None]
WRITERS: dict[str, Writer] = dict(zip(FORMATS, (write_peft, write_diffusers, write_kohya), strict=True))
