"""How many operations our methods add to a layer: exact numbers, so that none comes back unseen."""

import json

import pytest
import torch
from helpers.benchmarks import call
from launches import AT_ONCE, FEW, PRECISIONS, layer_counts, model_counts, one_more, wide_product
from workloads import WORKLOADS

HALF = "autocast, bfloat16 weights"
MANY = 1024  # enough for the weight side, and sooner done than the benchmark's


@pytest.mark.parametrize(
    ("method", "precision", "rows", "layer", "once"),
    [
        ("ETHER", "float32", MANY, (2, 6), (6, 9)),
        ("ETHER", "float32", FEW, (3, 5), (6, 9)),
        ("ETHER", "autocast", MANY, (2, 9), (8, 9)),
        ("ETHER", "autocast", FEW, (4, 7), (8, 9)),
        ("ETHER", HALF, MANY, (3, 9), (14, 9)),
        ("ETHER", HALF, FEW, (5, 7), (14, 9)),
        ("ETHER+", "float32", MANY, (3, 7), (14, 20)),
        ("ETHER+", "float32", FEW, (4, 6), (14, 20)),
        ("ETHER+", "autocast", MANY, (3, 10), (16, 20)),
        ("ETHER+", "autocast", FEW, (5, 8), (16, 20)),
        ("ETHER+", HALF, MANY, (4, 10), (22, 20)),
        ("ETHER+", HALF, FEW, (6, 8), (22, 20)),
    ],
)
def test_a_layer_among_others_has_few_operations_and_the_rest_is_done_once(method, precision, rows, layer, once):
    """Forward and backward."""
    for found, expected in zip(one_more(method, precision, rows), (layer, once), strict=True):
        assert (found.forward, found.backward) == expected


@pytest.mark.parametrize(
    ("method", "precision", "training", "inference"),
    [
        ("ETHER", "float32", (7, 13), 7),
        ("ETHER", "autocast", (9, 18), 9),
        ("ETHER+", "float32", (17, 27), 17),
        ("ETHER+", "autocast", (19, 32), 19),
    ],
)
def test_a_layer_on_its_own_has_these(method, precision, training, inference):
    counted = layer_counts(method, precision, MANY, training=True)
    assert (counted.forward, counted.backward) == training
    assert layer_counts(method, precision, MANY, training=False).forward == inference


@pytest.mark.slow  # convolutions in bfloat16 on a CPU
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("workload", ["cpu-small", "dit-small"])
def test_in_a_denoiser_a_layer_has_no_more_than_these(workload, precision):
    """On average, with what is done once."""
    found = model_counts(WORKLOADS[workload], precision, ["ETHER", "ETHER+", "LoRA r=4"])
    for method, most in {"ETHER": (6, 9), "ETHER+": (8, 12)}.items():
        counted = found[method + AT_ONCE]
        assert counted.forward <= most[0] and counted.backward <= most[1]
    if precision == "autocast":
        ether, lora = found["ETHER" + AT_ONCE], found["LoRA r=4"]
        assert ether.forward < lora.forward and ether.backward < lora.backward


def test_the_counted_product_is_one_operation_that_sums_in_float32():
    left, right = torch.randn(4, 512).bfloat16(), torch.randn(512, 8).bfloat16()
    torch.testing.assert_close(wide_product(left, right), left.float() @ right.float())


@pytest.mark.slow
def test_launches_are_counted_and_written(tmp_path):
    flags = ("--workloads", "dit-small", "--precisions", "float32", "--methods", "ETHER", "LoRA r=1")
    table = call("launches.py", "--output_dir", tmp_path, *flags)
    report = json.loads((tmp_path / "launches.json").read_text())
    assert {row["precision"] for row in report["layer"]} == {"float32"}
    assert {row["method"] for row in report["models"]} == {"ETHER", "ETHER, at once", "LoRA r=1"}
    assert "dit-small" in table and "once for all" in table
