"""How many operations an adapter adds to a layer: what decides on a GPU, counted without one.

    python benchmarks/launches.py --output_dir out/benchmarks

An operation is what PyTorch dispatches and is no view; on a GPU it is a launch of some microseconds, which for layers
of a diffusion model is longer than most of these operations take. Counted are those of the adapted layer less those of
the frozen one, forward and backward, and the bytes that they write: for one layer of 320 inputs and outputs, with many
and with few rows of input, and on average over the adapted layers of a small UNet and a small transformer. "At once"
says that what layers make of their vectors is made for all together (`ModelFactors.shared`), as the training scripts
do; in the UNet and the transformer making it is counted, for the layer it has a line of its own ("once for all").

Counts are those of a GPU: there, ETHER multiplies half precision into float32 without a cast, and this is the only
place where its operators ask for the device. On the CPU that one product is replaced by an operation that does the
same (`as_on_a_gpu`). Prints tables and writes JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace

import torch
from measuring import Operations, machine, make_parser
from peft.tuners.tuners_utils import BaseTunerLayer
from result_file import write_json
from torch import Tensor, nn
from workloads import METHODS, WORKLOADS, Workload, adapted, build

from ether_diffusion.tuner.operators import products
from ether_diffusion.tuner.shared_factors import ModelFactors

LIMIT, AT_ONCE = "frozen limit", ", at once"
COUNTED = [name for name in METHODS if name not in ("BOFT", "VeRA")]
"""BOFT and VeRA run in float32 alone, or share matrices over layers."""
PRECISIONS = {
    "float32": (torch.float32, False),
    "autocast": (torch.float32, True),  # weights are cast at every call
    "autocast, bfloat16 weights": (torch.bfloat16, True),  # as the training scripts have it
}
WIDTH, MANY, FEW = 320, 4096, 64


@dataclass(frozen=True)
class Count:
    """Operations, and bytes that they write, of one forward and one backward pass."""

    forward: float
    backward: float
    written: float

    def less(self, other: Count, layers: int = 1) -> Count:
        """What this has more than another, for each of the layers."""
        return Count(*((a - b) / layers for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@torch.library.custom_op("ether_benchmarks::wide_product", mutates_args=())
def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`products.wide_product` on the CPU: operands of half precision, sums in float32."""
    return left.float() @ right.float()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, ETHER's operators compute on the CPU as they do on a GPU."""
    stock = products.multiplies_wide, products.wide_product
    products.multiplies_wide, products.wide_product = (lambda a: a.dtype in products.HALF), wide_product
    try:
        yield
    finally:
        products.multiplies_wide, products.wide_product = stock


def count(model: nn.Module, inputs: dict, *, training: bool, autocast: bool, at_once: bool = False) -> Count:
    """Operations of one call of a model; with gradients where it is training."""
    context = ModelFactors(model).shared() if at_once else nullcontext()
    back = Operations()
    with torch.set_grad_enabled(training), as_on_a_gpu():
        with Operations() as ahead:
            with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(**inputs)
                y = y if isinstance(y, Tensor) else y[0]
        if training:
            gradient = torch.ones_like(y)
            with back:
                y.backward(gradient)
    return Count(len(ahead.names), len(back.names), ahead.written + back.written)


class Chain(nn.Module):
    """Equal layers, one after the other, that can be adapted."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.context_embedder = nn.Linear(WIDTH, WIDTH)  # by which the frozen limit knows the entrance
        self.attn = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(WIDTH, WIDTH)}) for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        for each in self.attn:
            x = each["to_q"](x)
        return x


def layer_counts(
    method: str, precision: str, rows: int, training: bool, *, length: int = 1, at_once: bool = False
) -> Count:
    """What a method adds to a chain of layers with this many rows of input, all of which need a gradient."""
    dtype, autocast = PRECISIONS[precision]
    base = Chain(length).to(dtype).requires_grad_(False)

    def counted(model: nn.Module, at_once: bool = False) -> Count:
        # No leaf: its gradient would be added to another, or not, and that is no operation of the layer.
        x = torch.randn(rows, WIDTH, dtype=dtype).requires_grad_(training).view(rows, WIDTH)
        return count(model, {"x": x}, training=training, autocast=autocast, at_once=at_once)

    return counted(adapted(base, method, ["to_q"]), at_once).less(counted(base))


def one_more(method: str, precision: str, rows: int) -> tuple[Count, Count]:
    """What one of many layers adds in training with the others at once, and what there is once for all of a shape."""
    two, three = (layer_counts(method, precision, rows, True, length=k, at_once=True) for k in (2, 3))
    layer = three.less(two)
    return layer, Count(*(a - 2 * b for a, b in zip(astuple(two), astuple(layer), strict=True)))


def model_counts(workload: Workload, precision: str, methods: Sequence[str] = COUNTED) -> dict[str, Count]:
    """What each method adds in training to a layer, on average over the adapted layers of a workload."""
    dtype, autocast = PRECISIONS[precision]
    base, inputs = build(replace(workload, device="cpu"))
    base = base.to(dtype)
    inputs = {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs.items()}
    found: dict[str, Count] = {}
    for method in (LIMIT, *methods):
        model = adapted(base, method, workload.targets)
        layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
        options = {"training": True, "autocast": autocast}
        for at_once in (False, True) if method.startswith("ETHER") else (False,):
            counted = count(model, inputs | {"return_dict": False}, **options, at_once=at_once)
            for parameter in model.parameters():
                parameter.grad = None
            found[method + AT_ONCE * at_once] = counted if method == LIMIT else counted.less(found[LIMIT], layers)
    del found[LIMIT]
    return found


def show(title: str, rows: list[dict]) -> None:
    print(f"\n{title:40}{'forward':>9}{'backward':>10}{'written':>12}")
    for row in rows:
        print(f"{row['method']:40}{row['forward']:>9.1f}{row['backward']:>10.1f}{row['written'] / 2**20:>9.2f} MB")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=["cpu-small", "dit-small"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--methods", nargs="+", choices=COUNTED, default=COUNTED)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    report: dict[str, list[dict]] = {"layer": [], "models": []}
    for precision in args.precisions:
        for training in (True, False):
            for rows in (MANY, FEW):
                about = {"precision": precision, "training": training, "rows": rows}
                table = [
                    {"method": method, **about, **asdict(layer_counts(method, precision, rows, training))}
                    for method in args.methods
                ]
                if training:
                    for method in [each for each in args.methods if each in ("ETHER", "ETHER+")]:
                        layer, once = one_more(method, precision, rows)
                        table.append({"method": method + AT_ONCE, **about, **asdict(layer)})
                        table.append({"method": f"{method}, once for all", **about, **asdict(once)})
                report["layer"] += table
                show(f"{precision}, {'training' if training else 'inference'}, {rows} rows", table)
        for name in args.workloads:
            found = model_counts(WORKLOADS[name], precision, args.methods)
            table = [
                {"method": method, "workload": name, "precision": precision, **asdict(each)}
                for method, each in found.items()
            ]
            report["models"] += table
            show(f"{name}, {precision}, training", table)
    write_json(args.output_dir / "launches.json", {"machine": machine(), **report})


if __name__ == "__main__":
    main()
