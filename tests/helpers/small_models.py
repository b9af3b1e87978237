"""Small models with layers of every kind that PEFT adapts, and configs for them."""

import copy

import torch
from peft import (
    get_peft_model,
)
from torch import nn

from ether_diffusion import EtherConfig


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(8, 16, bias=bias)
        self.lin1 = nn.Linear(16, 8, bias=bias)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.lin1(torch.relu(self.lin0(x.to(self.lin0.weight.dtype)))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, (3, 1), stride=2, bias=False)
        self.lin0 = nn.Linear(8, 4)

    def forward(self, x):
        x = x.to(self.conv.weight.dtype)[:, :4, None, None].expand(-1, -1, 5, 5)
        return self.lin0(self.down(torch.relu(self.conv(x))).mean((2, 3)))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 8)
        self.lin0 = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin1(self.lin0(self.emb((x[:, :4].abs() * 2).long() % 8))).mean(1)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Module()
        self.stack.layers = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x):
        for layer in self.stack.layers:
            x = layer(x)
        return x


CASES = {
    "mlp": (MLP, {"target_modules": ["lin0"]}),
    "mlp-both-layers-n4": (MLP, {"target_modules": ["lin0", "lin1"], "num_blocks": 4}),
    "mlp-plus": (MLP, {"target_modules": ["lin0", "lin1"], "method": "ether_plus"}),
    "mlp-plus-one-sided-n2": (
        MLP,
        {"target_modules": ["lin0"], "method": "ether_plus", "sides": "input", "num_blocks": 2},
    ),
    "mlp-all-linear": (MLP, {"target_modules": "all-linear"}),
    "mlp-regex": (MLP, {"target_modules": r".*lin\d", "exclude_modules": ["lin1"]}),
    "mlp-modules-to-save": (MLP, {"target_modules": ["lin0"], "modules_to_save": ["norm"]}),
    "conv": (ConvNet, {"target_modules": ["conv"]}),
    "conv-plus-n2": (ConvNet, {"target_modules": ["conv", "down", "lin0"], "method": "ether_plus", "num_blocks": 2}),
    "beside-an-embedding": (Embedded, {"target_modules": ["lin0"], "modules_to_save": ["emb"]}),
    "second-layer-only": (Blocks, {"target_modules": ["lin0"], "layers_to_transform": [1]}),
    "named-layers": (Blocks, {"target_modules": ["lin0"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
}


def build(case: str, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    kind, config = CASES[case]
    base = kind().to(dtype).eval()
    return base, get_peft_model(copy.deepcopy(base), EtherConfig(**{"init_weights": False, **config, **fields})).eval()


def inputs() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
