"""What tests do with adapter files that no training made."""

import torch

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.schema import (
    AdapterFile,
    expected_vectors,
)


def make_checkpoint(config: EtherConfig, component: str = "unet", layers: int = 2, seed: int = 0) -> AdapterFile:
    generator = torch.Generator().manual_seed(seed)
    n = config.num_blocks
    tensors = {
        f"mid.{k}.to_q.{name}": torch.randn(n, 4, generator=generator)
        for k in range(layers)
        for name in expected_vectors(config)
    }
    return AdapterFile({component: config}, {component: tensors}, {"prompt": "a photo of sks dog"})
