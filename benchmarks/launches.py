"""How many operations an adapted layer adds to the frozen one: on a GPU each is a kernel that is launched.

    python benchmarks/launches.py --output_dir out/benchmarks                       # counted, on any CPU
    python benchmarks/launches.py --output_dir out/benchmarks --workloads cpu-small dit-small --methods ETHER+

Layers as small as those of an attention wait for launches rather than for sums. An operation is what reaches PyTorch's
dispatcher and is no view; what it writes are the bytes of its results. Counted are a linear layer alone, on few rows
and on many, and whole denoisers, of which the operations of the same denoiser without an adapter are taken away and
the rest is divided by the number of adapted layers. Training counts forward and backward; under autocast the frozen
weights are bfloat16, as in the training scripts. An operation of PyTorch may be more than one kernel on a GPU (a
sum that starts from a matrix copies it first), whichever the method. Prints a table and writes JSON, by commit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from measuring import machine, make_parser
from peft.tuners.tuners_utils import BaseTunerLayer
from result_file import commit, write_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from workloads import METHODS, WORKLOADS, Workload, adapted, build

PRECISIONS = ("float32", "bfloat16 autocast")
LAYERS = {"layer, 64 rows": (64, 320, 640), "layer, 4096 rows": (4096, 320, 640)}
"""Rows, inputs and outputs of a linear layer alone: fewer rows than it has channels, and more."""
SMALL = {"cpu-small": "UNet", "dit-small": "DiT"}
ALLOCATIONS = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")


@dataclass
class Count:
    """Operations that are no views, and the bytes that they write."""

    operations: int = 0
    bytes: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(self.operations - other.operations, self.bytes - other.bytes)

    def per(self, layers: int) -> dict[str, float]:
        return {"operations": round(self.operations / layers, 2), "bytes": round(self.bytes / layers)}


class CountOperations(TorchDispatchMode):
    """While entered, counts into `count`, and by name into `names`."""

    def __init__(self, count: Count):
        super().__init__()
        self.count, self.names = count, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        written = [each for each in tree_iter(result) if isinstance(each, Tensor)]
        if written and not _is_view(func, (args, kwargs), written) and func._opname not in ALLOCATIONS:
            self.count.operations += 1
            self.count.bytes += sum(each.nbytes for each in written)
            self.names.append(func._opname)
        return result


def _is_view(func: Any, given: object, results: list[Tensor]) -> bool:
    """Whether an operation only describes storages anew that it was given."""
    if func._schema.is_mutable:
        return False
    storages = {each.untyped_storage()._cdata for each in tree_iter(given) if isinstance(each, Tensor)}
    return all(result.untyped_storage()._cdata in storages for result in results)


def casting(precision: str) -> AbstractContextManager:
    return nullcontext() if precision == "float32" else torch.autocast("cpu", torch.bfloat16)


@contextmanager
def counted(count: Count) -> Iterator[list[str]]:
    with CountOperations(count) as mode:
        yield mode.names


def passes(model: nn.Module, call: Callable[[], Tensor], precision: str, training: bool) -> dict[str, Count]:
    """What one call of the model costs, by "forward" and, in training, "backward"."""
    model.train(training)
    found = {"forward": Count(), "backward": Count()} if training else {"forward": Count()}
    _once(model, call, precision, training)  # constants are made once in a process
    with torch.set_grad_enabled(training), casting(precision):
        with counted(found["forward"]):
            y = call()
    if training:
        gradient = torch.ones_like(y)
        with counted(found["backward"]):
            y.backward(gradient)
    return found


def _once(model: nn.Module, call: Callable[[], Tensor], precision: str, training: bool) -> None:
    with torch.set_grad_enabled(training), casting(precision):
        y = call()
    if training:
        y.backward(torch.ones_like(y))
    for parameter in model.parameters():
        parameter.grad = None


def added(one: nn.Module, limit: nn.Module, call: Callable[[nn.Module], Tensor], precision: str) -> dict[str, dict]:
    """What every adapted layer of `one` costs more than it does in `limit`, by "training" and "inference"."""
    layers = sum(isinstance(module, BaseTunerLayer) for module in one.modules())
    result = {}
    for name, training in (("training", True), ("inference", False)):
        ours, theirs = (passes(model, lambda m=model: call(m), precision, training) for model in (one, limit))
        result[name] = {way: (ours[way] - theirs[way]).per(layers) for way in ours}
    return result


def as_trained(model: nn.Module, precision: str) -> nn.Module:
    """Frozen weights in the dtype that the training scripts give them; what is trained stays float32."""
    if precision != "float32":
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    return model


def layer_row(size: tuple[int, int, int], method: str, precision: str) -> dict[str, dict]:
    rows, inputs, outputs = size
    torch.manual_seed(0)
    base = nn.Sequential(nn.ModuleDict({"to_q": nn.Linear(inputs, outputs, bias=False)})).requires_grad_(False)
    one = as_trained(adapted(base, method, ["to_q"]), precision)
    as_trained(base, precision)
    x = torch.randn(rows, inputs, dtype=torch.float32 if precision == "float32" else torch.bfloat16)

    def call(model: nn.Module) -> Tensor:
        return model[0]["to_q"](x.detach().requires_grad_(torch.is_grad_enabled()))

    return added(one, base, call, precision)


def denoiser_row(workload: Workload, method: str, precision: str) -> dict[str, dict]:
    base, inputs = build(workload)
    limit, one = (adapted(base, each, workload.targets) for each in ("frozen limit", method))
    for name, parameter in limit.named_parameters():
        if parameter.requires_grad:  # gradients flow as far in both
            one.get_parameter(name).requires_grad_(True)
    one, limit = as_trained(one, precision), as_trained(limit, precision)
    return added(one, limit, lambda model: model(**inputs, return_dict=False)[0], precision)


def show(place: str, precision: str, rows: dict[str, dict]) -> None:
    print(f"\n{place + ', ' + precision:34}{'forward + backward':>20}{'MB written':>18}{'inference':>12}{'MB':>8}")
    for method, row in rows.items():
        train, infer = row["training"], row["inference"]["forward"]
        operations = f"{train['forward']['operations']:g} + {train['backward']['operations']:g}"
        written = f"{train['forward']['bytes'] / 1e6:.2f} + {train['backward']['bytes'] / 1e6:.2f}"
        print(f"{method:34}{operations:>20}{written:>18}{infer['operations']:>12g}{infer['bytes'] / 1e6:>8.2f}")


def run(places: list[str], methods: list[str], precisions: list[str]) -> dict[str, dict]:
    """Rows by place, precision and method."""
    report: dict[str, dict] = {}
    for place in places:
        report[place] = {}
        for precision in precisions:
            rows = {
                method: layer_row(LAYERS[place], method, precision)
                if place in LAYERS
                else denoiser_row(WORKLOADS[place], method, precision)
                for method in methods
            }
            show(place, precision, rows)
            report[place][precision] = rows
    return report


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workloads", nargs="*", choices=SMALL, default=list(SMALL), help="denoisers to count in")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    args: argparse.Namespace = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "launches.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs[commit()] = run([*LAYERS, *args.workloads], args.methods, args.precisions)
    write_json(path, {"machine": machine(), "runs": runs})


if __name__ == "__main__":
    main()
