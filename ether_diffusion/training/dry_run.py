"""What a run would train, write and need, told without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.training.card import CARD_NAME, GRID_NAME
from ether_diffusion.training.families.quantization import BITS
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.run import CheckedRun

OPTIMIZER_STATES = {"adamw": 2, "prodigy": 4}
"""Values that an optimiser keeps for each value that is trained."""
KEPT_IN_A_BLOCK = 17
"""Values for each of a block's inputs that its backward pass needs: 34 bytes where a value has two.

Source: arXiv:2205.05198, section 4.1, without the attention's scores, which no backend here keeps.
"""
TEXT_TOKENS = 512
"""Of a prompt, at most."""


def describe_run(checked: CheckedRun, images: str) -> str:
    """What would be trained and written, and an estimate of the memory by part, as lines for people.

    images: what is trained on, in words.
    """
    run, optimization = checked.run, checked.options.optimization
    count, processes = run.adaptation.parameter_count, run.accelerator.num_processes
    sizes = ", ".join(f"{width}x{height}" for height, width in run.targets)
    components = ", ".join(run.adaptation.configs) or "no component"
    parts = memory_parts(checked)
    width = max(map(len, parts))
    return "\n".join(
        [
            f"base: {run.source.name}, a {run.family_class.pipeline_class}",
            f"trained: {run.method.title} on {components}: {count:,} parameters at {optimization.learning_rate:g}",
            f"data: {images}, cut to {sizes} pixels",
            f"steps: {optimization.steps}, each of {optimization.samples_per_step(processes)} images",
            f"files in {run.output_dir}: the weights, {format_bytes(4 * count)} in float32; {CARD_NAME}; {GRID_NAME}",
            "memory of each process, an estimate by part (no weights were read):",
            *(f"  {name:{width}}  {format_bytes(size):>8}" for name, size in parts.items()),
        ]
    )


def memory_parts(checked: CheckedRun) -> dict[str, int]:
    """Part -> bytes of the weights, of what is trained with its gradients and optimiser, and of kept activations.

    Text encoders that are not trained leave before a transformer comes, so not all parts are there at once.
    """
    run, options = checked.run, checked.options
    dtype = torch.float32 if None in run.adaptation.configs.values() else PRECISIONS[run.precision]
    width, denoiser = dtype.itemsize, run.family_class.denoiser
    bits = BITS.get(str(options.performance.quantize), 8 * width)
    parts = {name: int(n * (bits / 8 if name == denoiser else width)) for name, n in run.blueprint.parameters.items()}
    states = OPTIMIZER_STATES[options.optimization.optimizer]
    parts["trained, gradients, optimiser"] = 4 * run.adaptation.parameter_count * (2 + states)
    if run.family_class.is_flow:
        parts["activations"] = width * _kept_values(checked, run.blueprint.models[denoiser])
    return parts


def _width(config: Mapping[str, Any]) -> int:
    """Of a token between the blocks of a transformer."""
    if "attention_head_dim" in config:
        return config["num_attention_heads"] * config["attention_head_dim"]
    return config.get("dim") or config["hidden_size"]


def _kept_values(checked: CheckedRun, transformer: nn.Module) -> int:
    """How many values of activations a forward pass keeps for the backward pass, about."""
    run, options = checked.run, checked.options
    tokens = max(prod(target) for target in run.targets) // run.blueprint.resolution_multiple**2 + TEXT_TOKENS
    inputs = options.optimization.train_batch_size * tokens * _width(transformer.config)
    blocks = sum(len(each) for each in transformer.children() if isinstance(each, nn.ModuleList))
    if options.performance.gradient_checkpointing:  # the input of each block, and one block anew
        return inputs * (blocks + KEPT_IN_A_BLOCK)
    return inputs * blocks * KEPT_IN_A_BLOCK
