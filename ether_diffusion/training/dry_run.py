"""What a run would train, write and need, told without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import nn

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.training.activations import TEXT_TOKENS, kept_values
from ether_diffusion.training.card import CARD_NAME, GRID_NAME
from ether_diffusion.training.families.quantization import BITS
from ether_diffusion.training.families.source import parameter_counts
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.run import CheckedRun

OPTIMIZER_STATES = {"adamw": 2, "prodigy": 4}
"""Values that an optimiser keeps for each value that is trained."""
ACTIVATIONS = "activations"


def describe_run(checked: CheckedRun, images: str, *, per_sample: int = 1, references: int = 0) -> str:
    """What would be trained and written, and an estimate of the memory by part, as lines for people.

    Args:
        images: what is trained on, in words.
        per_sample: images in a sample: two with one of the class.
        references: reference images beside each.
    """
    run, optimization = checked.run, checked.options.optimization
    count, processes = run.adaptation.parameter_count, run.accelerator.num_processes
    sizes = ", ".join(f"{width}x{height}" for height, width in run.targets)
    components = ", ".join(run.adaptation.configs) or "no component"
    parts = memory_parts(checked, per_sample=per_sample, references=references)
    name, peak = peak_of(checked, parts)
    width = max(map(len, parts))
    return "\n".join(
        [
            f"base: {run.source.name}, a {run.family_class.pipeline_class}",
            f"trained: {run.method.title} on {components}: {count:,} parameters at {optimization.learning_rate:g}",
            f"data: {images}, cut to {sizes} pixels",
            f"steps: {optimization.steps}, each of {optimization.samples_per_step(processes)} images",
            f"files in {run.output_dir}: the weights, {format_bytes(4 * count)} in float32; {CARD_NAME}; {GRID_NAME}",
            "memory of each process, an estimate by part (no weights were read):",
            *(f"  {part:{width}}  {format_bytes(size):>8}" for part, size in parts.items()),
            f"peak: {format_bytes(peak)}, {name}{'' if ACTIVATIONS in parts else '; activations are not estimated'}",
        ]
    )


def memory_parts(checked: CheckedRun, *, per_sample: int = 1, references: int = 0) -> dict[str, int]:
    """Part -> bytes of the weights, of what is trained with its gradients and optimiser, and of kept activations.

    Args:
        per_sample, references: as for `describe_run`.
    """
    run, options = checked.run, checked.options
    dtype = torch.float32 if None in run.adaptation.configs.values() else PRECISIONS[run.precision]
    width, denoiser = dtype.itemsize, run.family_class.denoiser
    bits = BITS.get(str(options.performance.quantize), 8 * width)
    parts = {name: int(n * (bits / 8 if name == denoiser else width)) for name, n in run.blueprint.parameters.items()}
    parts |= {name: width * count for name, count in parameter_counts(run.adaptation.beside).items()}
    states = OPTIMIZER_STATES[options.optimization.optimizer]
    parts["trained, gradients, optimiser"] = 4 * run.adaptation.parameter_count * (2 + states)
    if run.family_class.is_flow:
        images = per_sample * options.optimization.train_batch_size
        models = [run.blueprint.models[denoiser], *run.adaptation.beside.values()]
        parts[ACTIVATIONS] = width * sum(_kept_values(checked, each, images, shown=1 + references) for each in models)
    return parts


def peak_of(checked: CheckedRun, parts: Mapping[str, int]) -> tuple[str, int]:
    """When the most memory is needed, and how much.

    The text encoders of transformers leave before the denoiser comes, if none of them is trained.
    """
    family = checked.run.family_class
    encoders = [name for name in family.text_encoders if name in parts]
    if not family.is_flow or set(encoders) & set(checked.run.adaptation.configs):
        return "with all parts in memory", sum(parts.values())
    encoding = sum(parts[name] for name in encoders)
    training = sum(parts.values()) - encoding
    return max(("while prompts are encoded", encoding), ("in the training", training), key=lambda each: each[1])


def _kept_values(checked: CheckedRun, transformer: nn.Module, images: int, *, shown: int) -> int:
    """How many values of activations a forward pass keeps for the backward pass, about."""
    run, options = checked.run, checked.options
    tokens = max(prod(target) for target in run.targets) // run.blueprint.resolution_multiple**2
    checkpointing = options.performance.gradient_checkpointing
    return kept_values(transformer, images * (shown * tokens + TEXT_TOKENS), checkpointing=checkpointing)
