"""Merging into the weight, and the way back to its very bits."""

import pytest
import torch
from helpers.layers import make
from torch import nn

from ether_diffusion import EtherConfig


def test_merging_one_after_the_other_is_merging_both_and_unmerges_exactly():
    layer = make(nn.Linear(8, 12).half(), "ether_plus", "both", name="a")
    layer.update_layer("b", EtherConfig(init_weights=False))
    pristine = layer.weight.clone()
    layer.merge(adapter_names=["a"])
    layer.set_scale("a", 0.3)  # a strength that changes while merged applies from the next merge on
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    one_by_one = layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, pristine)
    layer.set_scale("a", 1.0)
    layer.merge(adapter_names=["a", "b"])
    assert torch.equal(layer.weight, one_by_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cycles", [3])
def test_merge_and_unmerge_never_drift(dtype, cycles):
    layer = make(nn.Linear(32, 16).to(dtype), "ether_plus", "both")
    pristine = layer.weight.clone()
    for _ in range(cycles):
        layer.merge()
        assert not torch.equal(layer.weight, pristine)
        layer.unmerge()
    assert torch.equal(layer.weight, pristine)


def test_unmerging_what_is_not_merged_only_warns():
    with pytest.warns(UserWarning, match="nothing is merged"):
        make(nn.Linear(4, 4)).unmerge()


def test_safe_merge_of_a_broken_adapter_changes_nothing():
    layer = make(nn.Linear(8, 8))
    pristine = layer.weight.clone()
    with torch.no_grad():
        layer.ether_u["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, pristine) and not layer.merged


def test_a_merged_and_disabled_layer_answers_as_the_base_and_stays_merged():
    layer = make(nn.Linear(8, 8))
    x = torch.randn(2, 8)
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base) and layer.merged
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), base)
