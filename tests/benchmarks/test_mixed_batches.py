"""The benchmark of mixed batches, called as users call it."""

import json

import pytest
from helpers.benchmarks import call


@pytest.mark.slow
def test_every_kind_of_batch_is_measured(tmp_path):
    table = call("mixed_batches.py", "--output_dir", tmp_path, "--quick")
    rows = json.loads((tmp_path / "mixed_batches.json").read_text())["rows"]
    assert {"none, again", "8 ETHER, rows", "8 ETHER+, rows", "8 LoRA r=4, adapter_names"} <= set(rows)
    assert all(row["ratio"] > 0 for row in rows.values()) and len(table.splitlines()) == len(rows) + 1
