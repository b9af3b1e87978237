"""The operations that an adapted layer adds to the frozen one. Exact counts: true on every machine."""

import json

import pytest
import torch
from helpers.benchmarks import call
from launches import LAYERS, PRECISIONS, Count, counted, denoiser_row, layer_row
from workloads import WORKLOADS

SMALL, LARGE = LAYERS
FLOAT32, AUTOCAST = PRECISIONS
ADDED = {
    ("ETHER", SMALL, FLOAT32): (4, 6, 4),
    ("ETHER", SMALL, AUTOCAST): (5, 6, 5),
    ("ETHER", LARGE, FLOAT32): (4, 8, 4),
    ("ETHER", LARGE, AUTOCAST): (5, 8, 5),
    ("ETHER+", SMALL, FLOAT32): (6, 12, 6),
    ("ETHER+", SMALL, AUTOCAST): (7, 12, 7),
    ("ETHER+", LARGE, FLOAT32): (7, 12, 7),
    ("ETHER+", LARGE, AUTOCAST): (8, 12, 8),
}
"""Forward and backward, and forward at inference."""


@pytest.mark.parametrize(("method", "place", "precision"), ADDED)
def test_an_adapted_layer_adds_no_more_operations_than_these(method, place, precision):
    row = layer_row(LAYERS[place], method, precision)
    counts = [row["training"]["forward"], row["training"]["backward"], row["inference"]["forward"]]
    assert tuple(count["operations"] for count in counts) == ADDED[method, place, precision]


@pytest.mark.parametrize(("workload", "most"), [("cpu-small", (8, 12)), ("dit-small", (8, 12.3))])
def test_in_a_denoiser_under_autocast_ether_launches_less_than_lora_and_ether_plus_little_more(workload, most):
    """In the DiT a layer in four gets an input that is not contiguous, which is copied for the backward pass."""
    plus, ether, lora = (
        denoiser_row(WORKLOADS[workload], method, AUTOCAST)["training"] for method in ("ETHER+", "ETHER", "LoRA r=4")
    )
    for way, limit in zip(("forward", "backward"), most, strict=True):
        assert plus[way]["operations"] <= limit
        assert ether[way]["operations"] < lora[way]["operations"]


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
    (places,) = json.loads((tmp_path / "launches.json").read_text())["runs"].values()
    assert list(places) == [SMALL, LARGE, "dit-small"]
    for place, precisions in places.items():
        assert list(precisions) == [FLOAT32] and list(precisions[FLOAT32]) == ["ETHER", "LoRA r=4"]
        assert place in table
        for row in precisions[FLOAT32].values():
            assert row["training"]["forward"]["operations"] > 0 and row["inference"]["forward"]["bytes"] > 0
