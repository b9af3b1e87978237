"""The benchmark of import times, called as users call it."""

import json

import pytest
from helpers.benchmarks import call


@pytest.mark.slow
def test_imports_are_compared_with_those_of_the_libraries(tmp_path):
    table = call("import_time.py", "--output_dir", tmp_path, "--rounds", 2, "--only", "import ether_diffusion")
    report = json.loads((tmp_path / "import_time.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "import diffusers, transformers, peft",
        "import ether_diffusion",
    ]
    assert (
        all(row["seconds"] > 0 and row["wall_seconds"] > 0 for row in report["rows"]) and len(table.splitlines()) == 3
    )
