"""How many values a step of training keeps for its backward pass, by formula, for a transformer of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

KEPT_IN_A_BLOCK = 17
"""Values for each of a block's inputs that its backward pass needs: 34 bytes where a value has two.

Source: arXiv:2205.05198, section 4.1, without the attention's scores, which no backend here keeps.
"""
TEXT_TOKENS = 512
"""Of a prompt, at most."""


def kept_values(transformer: nn.Module, tokens: int, *, checkpointing: bool) -> int:
    """Values of activations that a forward pass keeps, about: tokens · width · blocks · 17.

    With gradient checkpointing, the input of each block and what one block makes anew: tokens · width · (blocks + 17).

    Args:
        transformer: of diffusers, also without weights.
        tokens: of all images of the batch and of their prompts.
        checkpointing: whether blocks are computed anew in the backward pass.
    """
    inputs = tokens * width_of(transformer.config)
    blocks = sum(len(each) for each in transformer.children() if isinstance(each, nn.ModuleList))
    return inputs * (blocks + KEPT_IN_A_BLOCK if checkpointing else blocks * KEPT_IN_A_BLOCK)


def width_of(config: Mapping[str, Any]) -> int:
    """Of a token between the blocks of a transformer."""
    if "attention_head_dim" in config:
        return config["num_attention_heads"] * config["attention_head_dim"]
    return config.get("dim") or config["hidden_size"]
