"""The operations that an adapted layer adds to the frozen one. Exact counts: true on every machine."""

import json

import pytest
import torch
from helpers.benchmarks import call
from launches import LAYERS, PRECISIONS, Count, counted, layer_row

SMALL, LARGE = LAYERS
FLOAT32, AUTOCAST = PRECISIONS
ADDED = {
    ("ETHER", SMALL, FLOAT32): (7, 10),
    ("ETHER", SMALL, AUTOCAST): (11, 16),
    ("ETHER", LARGE, FLOAT32): (6, 11),
    ("ETHER", LARGE, AUTOCAST): (8, 18),
    ("ETHER+", SMALL, FLOAT32): (22, 34),
    ("ETHER+", SMALL, AUTOCAST): (26, 40),
    ("ETHER+", LARGE, FLOAT32): (21, 35),
    ("ETHER+", LARGE, AUTOCAST): (23, 42),
}
"""Forward and backward."""


@pytest.mark.parametrize(("method", "place", "precision"), ADDED)
def test_an_adapted_layer_adds_no_more_operations_than_these(method, place, precision):
    training = layer_row(LAYERS[place], method, precision)["training"]
    assert tuple(training[way]["operations"] for way in ("forward", "backward")) == ADDED[method, place, precision]


def test_views_and_allocations_are_no_operations_and_results_are_counted_in_bytes():
    x, count = torch.ones(4, 6), Count()
    with counted(count) as names:
        y = torch.empty(6, 4)
        torch.add(x.T, 1, out=y)
        x.unsqueeze(0).expand(2, -1, -1)[0].detach().add_(0)
    assert names == ["add", "add_"] and count == Count(operations=2, bytes=2 * 24 * 4)


@pytest.mark.slow
def test_launches_are_counted_in_a_denoiser_and_written(tmp_path):
    flags = ("--workloads", "dit-small", "--methods", "ETHER", "LoRA r=4", "--precisions", FLOAT32)
    table = call("launches.py", "--output_dir", tmp_path, *flags)
    places = json.loads((tmp_path / "launches.json").read_text())["places"]
    assert list(places) == [SMALL, LARGE, "dit-small"]
    for place, precisions in places.items():
        assert list(precisions) == [FLOAT32] and list(precisions[FLOAT32]) == ["ETHER", "LoRA r=4"]
        assert place in table
        for row in precisions[FLOAT32].values():
            assert row["training"]["forward"]["operations"] > 0 and row["inference"]["forward"]["bytes"] > 0
