"""Parts of models that see each sample of a batch as several rows, side by side."""

from __future__ import annotations

from torch import nn

FLATTENED = {"Krea2TextFusion": "layerwise_blocks"}
"""By the name of a class: its part of which each token is a row, the tokens of a sample one after the other."""


def flattened_modules(model: nn.Module) -> set[nn.Module]:
    """All modules within such parts of a model. Everywhere else a row is a sample."""
    parts = [
        module.get_submodule(part)
        for module in model.modules()
        if (part := FLATTENED.get(type(module).__name__)) is not None
    ]
    return {module for part in parts for module in part.modules()}
