"""The benchmark of import times, called as users call it."""

import json

import pytest
from helpers.benchmarks import call


@pytest.mark.slow
def test_imports_are_compared_with_those_of_the_libraries(tmp_path):
    table = call("import_time.py", "--output_dir", tmp_path, "--rounds", 2, "--only", "import ether_diffusion")
    report = json.loads((tmp_path / "import_time.json").read_text())
    assert [row["name"] for row in report["rows"]][1:] == ["import ether_diffusion"]
    assert all(row["seconds"] > 0 < row["wall_seconds"] for row in report["rows"])
    assert len(table.splitlines()) == 3
