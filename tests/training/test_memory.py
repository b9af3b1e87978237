"""How much memory a run needs, in numbers and in words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ether_diffusion.training import memory


def test_the_peak_on_the_cpu_is_that_of_the_process():
    memory.start_measuring("cpu")
    before = memory.current_memory("cpu")
    held = np.ones(1 << 25)  # 256 MiB
    during = memory.current_memory("cpu")
    del held
    assert during - before > 200 << 20
    assert memory.peak_memory("cpu") >= during - (16 << 20)


def test_the_peak_on_systems_without_proc_is_in_bytes_too(monkeypatch):
    here = memory.peak_memory("cpu")
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    assert 0.5 < memory.peak_memory("cpu") / here < 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_that_of_tensors_since_the_start():
    torch.ones(1 << 24, device="cuda")
    memory.start_measuring("cuda")
    held = torch.ones(1 << 20, device="cuda")  # 4 MiB
    assert memory.current_memory("cuda") >= 4 << 20
    del held
    assert 4 << 20 <= memory.peak_memory("cuda") < 32 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (123_456_789, "123 MB"), (4e9, "4.00 GB")],
)
def test_sizes_are_written_for_people(count, text):
    assert memory.format_bytes(int(count)) == text
