"""The benchmark of the engine's overhead, called as users call it."""

import json

import pytest
from helpers.benchmarks import call


@pytest.mark.slow
def test_the_overhead_is_measured_for_every_number_of_requests(tmp_path):
    table = call("engine_overhead.py", "--output_dir", tmp_path)
    report = json.loads((tmp_path / "engine_overhead.json").read_text())
    assert [row["requests"] for row in report["rows"]] == [1, 2, 4, 8, 16]
    assert all(row["forward"] > 0 and row["gap"] > 0 for row in report["rows"]) and report["stock"]["gap"] > 0
    assert "stock pipeline" in table and len(table.splitlines()) == 7
