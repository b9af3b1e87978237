"""What a training step costs with each method, against the frozen model's own step.

    python benchmarks/training_step.py --output_dir out/benchmarks                     # a small UNet, any CPU
    python benchmarks/training_step.py --output_dir out/benchmarks --workloads dit-small  # a small transformer
    python benchmarks/training_step.py --output_dir out/benchmarks --workloads sd15-512 sdxl-1024 flux2-klein-512

Whole steps of the optimiser: forward, backward, AdamW; ETHER's as the training scripts take them, with what layers
make of their vectors made for all together. The limit is a step in which gradients flow through the whole
frozen model to one bias at its entrance. Every method's step is timed between two steps of the limit; reported are
the median of those ratios and their quartiles. Memory: on a CPU the bytes kept for the backward pass, on a GPU the
peak. Weights are random: neither time nor memory depends on them. Prints a table and writes JSON.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from measuring import bytes_saved, machine, make_parser, paired
from result_file import write_json
from torch import nn
from workloads import METHODS, WORKLOADS, adapted, build, read_workloads

from ether_diffusion.tuner.shared_factors import ModelFactors

LIMIT, DENSE = "frozen limit", "paper's dense ETHER"


def make_step(model: nn.Module, inputs: dict, checkpointing: bool) -> Callable[[], None]:
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    factors = ModelFactors(model)  # of ETHER's layers alone

    def step() -> None:
        with factors.shared():
            model(**inputs, return_dict=False)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def memory(step: Callable[[], None], model: nn.Module, inputs: dict, device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with bytes_saved(model) as kept:
        model(**inputs, return_dict=False)
    return kept[0]


def run(name: str, methods: list[str], rounds: int) -> dict:
    workload = WORKLOADS[name]
    base, inputs = build(workload)
    models = {method: adapted(base, method, workload.targets) for method in (LIMIT, *methods)}
    steps = {m: make_step(model, inputs, workload.gradient_checkpointing) for m, model in models.items()}
    rows = {}
    for method, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[method] = {"parameters": trained, "memory": memory(steps[method], model, inputs, workload.device)}
    reference = steps.pop(LIMIT)
    # The limit against itself shows what the machine's noise leaves of a ratio of 1.
    for method, timing in paired(reference, {LIMIT: reference, **steps}, rounds, workload.device).items():
        rows[method] |= timing
    return rows


def show(name: str, rows: dict) -> None:
    print(f"\n{name:22}{'parameters':>12}{'step':>10}{'ratio':>8}{'quartiles':>16}{'memory':>12}{'ratio':>8}")
    for method, row in rows.items():
        print(
            f"{method:22}{row['parameters']:>12,}{row['seconds'] * 1e3:>7.0f} ms{row['ratio']:>8.3f}"
            f"{row['ratio_low']:>9.3f}–{row['ratio_high']:.3f}{row['memory'] / 2**20:>9.1f} MB"
            f"{row['memory'] / rows[LIMIT]['memory']:>8.3f}"
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, DENSE], default=[*METHODS, DENSE])
    args = read_workloads(parser)
    for name in args.workloads:
        rows = run(name, args.methods, args.rounds)
        show(name, rows)
        report = {"workload": name, "machine": machine(), "rounds": args.rounds, "rows": rows}
        write_json(args.output_dir / f"training_step_{name}.json", report)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
