"""What tests do with the miniature of a transformer."""

from pathlib import Path

import torch

from ether_diffusion import EtherConfig, miniature


def save_own_adapter(folder: Path) -> Path:
    """An adapter drawn at random, in a folder "own"."""
    pipe = miniature.load_pipeline("dit")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(EtherConfig(method="ether_plus", init_weights=False))
    pipe.save_ether_weights(folder / "own")
    return folder / "own"
