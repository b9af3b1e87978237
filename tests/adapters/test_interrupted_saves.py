"""Saves that a full disk or a kill ends: what was there stays whole, and nothing half-written is left."""

import itertools
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import make_checkpoint

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.reading import (
    read_adapter_file,
)
from ether_diffusion.adapters.schema import (
    WEIGHTS_NAME,
    AdapterFile,
)
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.files import ABANDONED_AFTER


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(target_modules=["to_q"])))
    return path


def test_the_temporary_of_a_killed_save_is_removed_by_a_later_one_and_that_of_a_running_one_is_not(file):
    old, young, other = (file.parent / name for name in (f".{file.name}.a.tmp", f".{file.name}.b.tmp", ".other.a.tmp"))
    for left in (old, young, other):
        left.write_bytes(b"half a file")
    for left in (old, other):
        os.utime(left, (0, time.time() - ABANDONED_AFTER - 1))
    write_adapter_file(file, make_checkpoint(EtherConfig(target_modules=["to_q"])))
    assert sorted(file.parent.iterdir()) == sorted([file, young, other])


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes: a write fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_is_named_and_leaves_the_old_file_alone(file, room):
    before = file.read_bytes()
    with full_disk(room), pytest.raises(OSError, match=f"nothing was saved: .*{WEIGHTS_NAME}"):
        write_adapter_file(file, make_checkpoint(EtherConfig(target_modules=["to_q"]), layers=50))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def save_until_killed(path: Path, checkpoints: list[AdapterFile]) -> int:
    """A process that saves one checkpoint after the other under one name, slowly, and never ends; its id."""
    child = os.fork()
    if child == 0:
        try:
            sync = os.fsync
            os.fsync = lambda handle: (time.sleep(0.01), sync(handle))
            for checkpoint in itertools.cycle(checkpoints):
                write_adapter_file(path, checkpoint)
        finally:
            os._exit(1)
    return child


def kill_saves(path: Path, kills: int) -> tuple[set[int], int]:
    """Kill saves at random moments and look at the file each time.

    Returns which of the two saved adapters were found, by their layers, and how many kills came in the middle.
    """
    config, rng, found = EtherConfig(target_modules=["to_q"]), random.Random(0), set()
    wanted = {
        layers: {f"mid.{k}.to_q.ether_u": torch.full((1, 1 << 14), float(layers)) for k in range(layers)}
        for layers in (20, 60)
    }
    checkpoints = [AdapterFile({"unet": config}, {"unet": vectors}) for vectors in wanted.values()]
    write_adapter_file(path, checkpoints[0])
    started = time.perf_counter()
    write_adapter_file(path, checkpoints[1])
    duration = min(time.perf_counter() - started, 0.1)
    for _ in range(kills):
        child = save_until_killed(path, checkpoints)
        time.sleep(rng.uniform(0, 3 * duration + 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)  # it was at work until then, and did not end by an error of its own
        vectors = read_adapter_file(path).tensors["unet"]
        assert vectors.keys() == wanted[len(vectors)].keys()
        assert all(torch.equal(vectors[key], vector) for key, vector in wanted[len(vectors)].items())
        found.add(len(vectors))
    return found, sum(left.name.endswith(".tmp") for left in path.parent.iterdir())


def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path):
    kill_saves(tmp_path / WEIGHTS_NAME, 10)


@pytest.mark.slow
def test_two_hundred_killed_saves_leave_a_whole_file_each(tmp_path):
    found, in_the_middle = kill_saves(tmp_path / WEIGHTS_NAME, 200)
    assert found == {20, 60}
    assert in_the_middle > 10
