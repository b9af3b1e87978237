"""Strengths beside adapters of PEFT's other methods: those on which PEFT sets one, and those on which it sets none."""

import copy

import numpy as np
import pytest
import torch
from helpers.pipelines import generate
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    ShiraConfig,
)

from ether_diffusion import EtherLayer

WITHOUT = {
    "OFT": OFTConfig(r=2, oft_block_size=0, target_modules=["to_v"]),
    "BOFT": BOFTConfig(boft_block_size=2, target_modules=["to_v"]),
    "HRA": HRAConfig(r=2, target_modules=["to_v"]),
    "IA3": IA3Config(target_modules=["to_v"], feedforward_modules=[]),
}
WITH = {
    "LoRA": LoraConfig(r=2, init_lora_weights=False, target_modules=["to_v"]),
    "LoHa": LoHaConfig(r=2, init_weights=False, target_modules=["to_v"]),
    "LoKr": LoKrConfig(r=2, init_weights=False, target_modules=["to_v"]),
    "SHiRA": ShiraConfig(r=2, init_weights=False, target_modules=["ff.net.2"]),  # it takes no layer with an adapter
}


@pytest.fixture
def beside(trained):
    """beside(config): the pipeline with ETHER, "default", and an adapter of that config, "other"."""

    def add(config):
        torch.manual_seed(2)
        trained.unet.add_adapter(copy.deepcopy(config), adapter_name="other")
        return trained

    return add


def strengths(pipe) -> set[float]:
    return {layer.scaling["default"] for layer in pipe.unet.modules() if isinstance(layer, EtherLayer)}


@pytest.mark.parametrize("method", WITHOUT)
def test_ether_is_set_beside_an_adapter_on_which_peft_sets_no_strength(beside, method):
    pipe = beside(WITHOUT[method])
    pipe.set_adapters("default", 0.5)
    assert pipe.get_active_adapters() == ["default"] and strengths(pipe) == {0.5}
    pipe.set_adapters(["default", "other"], [0.25, 1.0])
    assert pipe.get_active_adapters() == ["default", "other"] and strengths(pipe) == {0.25}
    for weights in ([0.75, 0.5], [0.75, 0.0], 0.75, [0.75, {"unet": 2.0}], [0.75, {"unet": {"mid": 0.5}}]):
        with pytest.raises(ValueError, match=rf"PEFT sets no strength on its method \({method}\).* leave it at 1"):
            pipe.set_adapters(["default", "other"], weights)
        assert pipe.get_active_adapters() == ["default", "other"] and strengths(pipe) == {0.25}


@pytest.mark.parametrize("method", WITH)
def test_both_are_set_beside_an_adapter_on_which_peft_sets_one(beside, method):
    pipe = beside(WITH[method])
    pipe.set_adapters("default", 0.5)
    alone = generate(pipe)
    images = []
    for strength in (0.0, 0.5, 1.0):
        pipe.set_adapters(["default", "other"], [0.5, strength])
        assert strengths(pipe) == {0.5} and pipe.get_active_adapters() == ["default", "other"]
        images.append(generate(pipe))
    assert np.abs(images[0] - alone).max() < 1e-4 < min(np.abs(images[k] - images[k - 1]).max() for k in (1, 2))
