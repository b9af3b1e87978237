"""Files and folders that appear complete: who may read them."""

import os
import stat

import pytest
import torch
from helpers.pipelines import adapt
from safetensors.torch import save_file

from ether_diffusion.export import export_lora, merge_adapters
from ether_diffusion.files import new_entries, new_path, replace_file


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def usual(request):
    """The mode of a new file, under several umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_files_can_be_read_as_far_as_the_umask_lets_others(tmp_path, usual):
    tensors = {"a": torch.zeros(2)}
    with new_path(tmp_path / "one.safetensors") as path:
        save_file(tensors, path)
    with new_path(tmp_path / "folder") as path:
        (path / "inner").mkdir(parents=True)
        save_file(tensors, path / "inner" / "two.safetensors")
    with new_entries(tmp_path / "entries") as path:
        save_file(tensors, path / "three.safetensors")
    replace_file(tmp_path / "four", b"")
    assert modes(tmp_path) == {usual}
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(names) == ["four", "one.safetensors", "three.safetensors", "two.safetensors"]


def test_a_mode_that_lets_more_is_kept(tmp_path):
    with new_path(tmp_path / "script") as path:
        path.write_text("#!/bin/sh")
        path.chmod(0o755)
    assert modes(tmp_path) == {0o755}


def test_exported_files_and_pipelines_can_be_read_by_others(tiny_pipeline, tmp_path):
    pipe = adapt(tiny_pipeline, num_blocks=2)
    for to in ("peft-lora", "diffusers-lora", "kohya"):
        export_lora(pipe, tmp_path / to, to=to)
    merge_adapters(pipe, tmp_path / "merged")
    assert all(mode & 0o044 == 0o044 for mode in modes(tmp_path))
