"""Processes that know each other, forked from the test's own."""

import os
import socket
from collections.abc import Callable

import torch.multiprocessing as mp
from accelerate import Accelerator
from helpers.scripts import reset_accelerate


def in_processes(count: int, target: Callable, *arguments: object) -> None:
    """Call `target(accelerator, *arguments)` in so many processes; raises where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_forked, (count, target, port, *arguments), nprocs=count, start_method="fork")


def _forked(rank: int, count: int, target: Callable, port: int, *arguments: object) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == count
    target(accelerator, *arguments)
    accelerator.end_training()
