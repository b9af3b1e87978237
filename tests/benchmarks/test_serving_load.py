"""The server under load, as the benchmark puts it there."""

import json

import pytest
from helpers.benchmarks import call


@pytest.mark.slow
def test_under_load_nothing_is_lost_nothing_is_wrong_and_memory_stays_flat(tmp_path, tiny_pipeline_folder):
    flags = ["--base", tiny_pipeline_folder, "--host_memory", 1, "--further", 400]
    call("serving_load.py", "--output_dir", tmp_path, *flags)
    report = json.loads((tmp_path / "serving_load.json").read_text())
    assert (report["answered"], report["lost"], report["wrong"], report["left"]) == (800, 0, 0, 30)
    assert report["largest_distance"] <= 1 and report["seconds_until_rows_were_free"] < 5
    assert report["settings"]["names"] == 1000 and report["adapter_host_bytes"] <= 2**20
    assert report["adapter_loads"] > 400  # few fit, so that most are read again
    first, *_, last = report["resident_mib"]
    assert last < 1.05 * first
