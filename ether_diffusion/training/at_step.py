"""An adapter as it was after an earlier step of its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import AdapterFile, canonical_path, without_base_layer
from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoint_files import PREFIX, read_checkpoint

COMPONENTS, ADAPTER = "components.", ".default"
"""What the names of vectors in a checkpoint begin and end with."""


def adapter_at_step(run: Path, step: int) -> AdapterFile:
    """The adapter that a training of ETHER left in a folder, with the vectors of the checkpoint after a step.

    Raises:
        InputError: no such checkpoint, a damaged one, one of a run whose adapter is a running average, or of other
            vectors than the adapter's.
        EtherFileError: the adapter cannot be read.
    """
    last, checkpoint = find_adapter_file(run), read_checkpoint(run / f"{PREFIX}{step}")
    if checkpoint.run.get("use_ema"):
        raise InputError(f"{checkpoint.path}: the run keeps a running average (--use_ema), which is not in it apart")
    vectors = {}
    for name, vector in checkpoint.vectors.items():
        path, _, kind = name.removeprefix(COMPONENTS).removesuffix(ADAPTER).rpartition(".")
        component, _, path = path.partition(".")
        vectors[f"{component}.{canonical_path(component, without_base_layer(path))}.{kind}"] = vector
    wanted = {f"{component}.{key}": tensor for component, each in last.tensors.items() for key, tensor in each.items()}
    if last.weights or any(key not in wanted or wanted[key].shape != each.shape for key, each in vectors.items()):
        raise InputError(f"{checkpoint.path}: holds other vectors than the adapter beside it")
    # What a model does not use, such as the last block's queries of text in Stable Diffusion 3, is not trained.
    tensors = {
        component: {key: vectors.get(f"{component}.{key}", tensor).to(tensor.dtype) for key, tensor in each.items()}
        for component, each in last.tensors.items()
    }
    return replace(last, tensors=tensors)
