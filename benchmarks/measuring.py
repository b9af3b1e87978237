"""Paired timing, memory and the description of the machine, shared by the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import peft
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark: its docstring as it is written, and --output_dir."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    described: dict[str, str | int] = {"cpu": name, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def paired(reference: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int, device: str) -> dict:
    """Every round times the reference, then each of the others with the reference again after it.

    Returns, by name: the median time, the median of the ratios to the mean of the two references around it, and
    their quartiles. What slows the machine for longer than two calls takes cancels out.
    """
    for function in (reference, *others.values()):
        function()  # warm
    times, ratios = ({name: [] for name in others} for _ in range(2))
    for _ in range(rounds):
        before = seconds(reference, device)
        for name, function in others.items():
            own, after = seconds(function, device), seconds(reference, device)
            times[name].append(own)
            ratios[name].append(2 * own / (before + after))
            before = after
    return {name: {"seconds": statistics.median(times[name])} | spread(ratios[name]) for name in others}


def spread(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


@contextlib.contextmanager
def bytes_saved(model: torch.nn.Module) -> Iterator[list[int]]:
    """The bytes of all storages kept for the backward pass that are not the model's own; a list of one number."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # a storage that is freed could come back under the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    result: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result
    result.append(sum(kept.values()))


class Operations(TorchDispatchMode):
    """While entered, the names of all operations that are no views, and the bytes that they write.

    On a GPU each of them is a launch, some a few. Allocations are none.
    """

    none = (
        "empty",
        "new_empty",
        "detach",
        "_unsafe_view",
        "promote_types",
        "is_pinned",
        "_local_scalar_dense",
        "_version",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(self.none):
            self.names.append(func.__name__)
            self.written += sum(each.nbytes for each in tree_iter(result) if isinstance(each, torch.Tensor))
        return result


class LiveBytes(TorchDispatchMode):
    """While entered, the bytes of all storages that were made inside and are alive; tensors may be without data.

    A storage counts in whole blocks of 512 bytes, as CUDA's allocator hands them out.
    """

    block = 512

    def __init__(self) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._now = self._peak = 0

    def now(self) -> int:
        return self._now

    def peak(self) -> int:
        """The most since `restart`."""
        return self._peak

    def restart(self) -> int:
        """Forget the peak so far. Returns the bytes alive now."""
        self._peak = self._now
        return self._now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if not isinstance(each, torch.Tensor) or each.layout is not torch.strided:  # sparse: of several storages
                continue
            if (storage := each.untyped_storage()) not in self._seen:
                size = -(-storage.nbytes() // self.block) * self.block
                self._seen.add(storage)
                self._now += size
                self._peak = max(self._peak, self._now)
                weakref.finalize(storage, self._forget, size)
        return result

    def _forget(self, size: int) -> None:
        self._now -= size


class CudaBytes:
    """The same three questions to CUDA's allocator, which counts from the moment this is made."""

    def __init__(self) -> None:
        self._start = torch.cuda.memory_allocated()

    def now(self) -> int:
        return torch.cuda.memory_allocated() - self._start

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._start

    def restart(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return self.now()
