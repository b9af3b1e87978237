"""Layers with ETHER of random vectors, and the dense definition of what they compute."""

import copy

import torch
from helpers.oracle import dense_weight
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.layer import EtherConv2d, EtherLayer, EtherLinear


def make(base: nn.Module, method="ether", sides=None, n=2, name="default") -> EtherLayer:
    kind = EtherConv2d if isinstance(base, nn.Conv2d) else EtherLinear
    return kind(base, name, EtherConfig(method=method, sides=sides, num_blocks=n, init_weights=False))


def oracle_weight(layer: EtherLayer, names: list[str]) -> torch.Tensor:
    weight = layer.unmerged_weight()
    for name in names:
        weight = dense_weight(weight, *layer.vectors(name), layer.scaling[name])
    return weight


def oracle(layer: EtherLayer, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    base = copy.deepcopy(layer.get_base_layer())
    return torch.func.functional_call(base, {"weight": oracle_weight(layer, names)}, (x,))
