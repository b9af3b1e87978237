"""From files to files: open a base with adapters on it, write pipelines with adapters merged into their weights."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.components import check_removable, ether_layers, models_of, records_of
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.base_models import open_pipeline
from ether_diffusion.control.classes import control_pipeline_class
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.control.pipelines import over
from ether_diffusion.dtypes import DTYPES
from ether_diffusion.export.changes import check_acting, check_alone
from ether_diffusion.files import new_path
from ether_diffusion.tuner.base_layer import PLAIN_DTYPES, put_values
from ether_diffusion.tuner.undo import restored_on_error

logger = logging.getLogger(__name__)


def open_adapted(
    base: str | Path,
    adapters: Sequence[str | Path],
    scales: Sequence[float] = (1.0,),
    *,
    allow_other_base: bool = False,
    variant: str | None = None,
    revision: str | None = None,
) -> tuple[DiffusionPipeline, list[str]]:
    """Load a base pipeline in float32 and put adapters on it, one after the other.

    Args:
        base: a folder, or an id on the Hub.
        adapters: files, folders or ids, in the order in which they act.
        scales: their strengths, or one for all.
        allow_other_base: go on where an adapter says that it was trained on other weights.
        variant, revision: of the base, as `from_pretrained` takes them.

    Returns:
        The pipeline, on which the adapters are active, and their names.

    A file without a fingerprint of its base, such as PEFT's, cannot be checked, which is logged as a warning.

    Raises:
        OSError: the base or an adapter cannot be found.
        ValueError: an adapter that does not fit the base, or was trained on other weights.
    """
    if len(scales) not in (1, len(adapters)):
        raise ValueError(f"{len(adapters)} adapters, but {len(scales)} strengths: one for each, or one for all")
    files = [find_adapter_file(adapter) for adapter in adapters]  # before the base, which takes longer
    pipe = open_pipeline(base, dtype=torch.float32, variant=variant, revision=revision)
    if any(CONTROL in file.weights for file in files):
        pipe = over(control_pipeline_class(type(pipe)), pipe)
    names = [_label(number, adapter) for number, adapter in enumerate(adapters, 1)]
    for name, file in zip(names, files, strict=True):
        record = attach(pipe, file, name)
        if not file.metadata.get("base_fingerprint"):
            logger.warning("%s does not say which weights it was trained on: not checked", file.source)
        if record.other_base and not allow_other_base:
            raise ValueError(
                f"{file.source} was trained on other weights than those of {', '.join(record.other_base)} in {base} "
                f"(its base model: {file.metadata.get('base_model') or 'unknown'}); to use it on these all the "
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
    adapter_names: Sequence[str] | str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Path:
    """Write the whole pipeline with adapters merged into its weights: a stock pipeline, which needs no ETHER to open.

    The pipeline passed in is left with merged weights, in `dtype`, and without adapters. Where anything raises, a full
    disk too, it is as it was, and nothing is left on the disk; the weights as they were are kept until then.

    Args:
        output_dir: a new folder.
        adapter_names: in the order in which they act. Default: the active adapters.
        dtype: of what is written, except for modules that a model declares to need float32: torch.float32, float16 or
            bfloat16, or its name.

    Raises:
        ValueError: another dtype, nothing to merge (no adapter that acts), another method's adapter on the pipeline,
            replaced modules or a control encoder in use, a component that is a `PeftModel`, a quantised or offloaded
            weight, or NaN or infinity in a merged weight.
        FileExistsError: there is something under that name; nothing is overwritten.
    """
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in PLAIN_DTYPES:
        raise ValueError(f"dtype={dtype!r}: there are {', '.join(DTYPES)}, as names or as torch's own (torch.float32)")
    check_alone(pipe)
    check_removable(pipe, records_of(pipe))
    check_acting(pipe, "merge", adapter_names)
    models = models_of(pipe).values()
    with new_path(Path(output_dir)) as partial, restored_on_error(models):
        pipe.fuse_ether(safe_fusing=True, adapter_names=adapter_names)
        layers = [layer for model in models for _, layer in ether_layers(model) if layer.merged]
        merged = [(layer.get_base_layer(), layer.get_base_layer().weight.data) for layer in layers]
        pipe.unload_ether_weights()  # takes the adapters off, and brings the base weights back
        for base, weight in merged:
            put_values(base, "weight", weight)
        for model in models:
            _cast(model, chosen)
        pipe.save_pretrained(partial)
    return Path(output_dir)


@torch.inference_mode(False)
def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a model saves, but for the modules that it declares to need float32."""
    exact, saved = set(getattr(model, "_keep_in_fp32_modules", None) or ()), model.state_dict().keys()
    for name, tensor in list(itertools.chain(model.named_parameters(), model.named_buffers())):
        if name in saved and tensor.is_floating_point() and exact.isdisjoint(name.split(".")):
            path, _, last = name.rpartition(".")
            put_values(model.get_submodule(path), last, tensor.data.to(dtype))
