"""What an adapter costs at inference: a denoising step, and loading, against no adapter and against LoRA.

    python benchmarks/inference.py --output_dir out/benchmarks                        # a small UNet, any CPU
    python benchmarks/inference.py --output_dir out/benchmarks --workloads dit-small  # a small transformer
    python benchmarks/inference.py --output_dir out/benchmarks --workloads sd15-512 sdxl-1024

Every row's step is timed between two steps of the model without an adapter; reported are the median of those ratios
and their quartiles. The calls in the life of an adapter (load from a file, set_adapters, fuse, unfuse, unload) are
timed beside LoRA's, and their ratios are to LoRA's in the same round.
Weights are random: times do not depend on them.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser, paired, seconds
from peft.utils import get_peft_model_state_dict
from result_file import write_json
from torch import nn
from workloads import WORKLOADS, Workload, adapted, build, read_workloads, share

from ether_diffusion.control.pipelines import denoiser_name
from ether_diffusion.tuner.layer import EtherLayer

NONE, LORA = "no adapter", "LoRA r=4"


def fused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, EtherLayer):
            weight = module.get_base_layer().weight
            module.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)  # its own
            module.merge()
    return model


def make_step(model: nn.Module, inputs: dict) -> Callable[[], None]:
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def step() -> None:
        model(**inputs, return_dict=False)

    return step


def denoising(name: str, rounds: int) -> dict:
    workload = WORKLOADS[name]
    base, inputs = build(workload)

    def of(method: str) -> nn.Module:
        return adapted(base, method, workload.targets)

    models = {
        NONE: share(base),
        "ETHER, unfused": of("ETHER"),
        "ETHER+, unfused": of("ETHER+"),
        "ETHER, fused": fused(of("ETHER")),
        "LoRA r=4, unfused": of("LoRA r=4"),
    }
    steps = {row: make_step(model, inputs) for row, model in models.items()}
    return paired(make_step(base, inputs), steps, rounds, workload.device)


def empty_pipeline(workload: Workload, denoiser: nn.Module) -> DiffusionPipeline:
    """The workload's pipeline with its denoiser alone."""
    names, options = DiffusionPipeline._get_signature_keys(workload.pipeline)
    (name,) = {"unet", "transformer"} & {*names}
    quiet = {"requires_safety_checker": False} if "requires_safety_checker" in options else {}
    return workload.pipeline(**{**dict.fromkeys(names), name: denoiser}, **quiet)


def loading(name: str, rounds: int) -> dict:
    """For every call on an adapter: median seconds, and the median of the ratios to LoRA's in the same round."""
    workload, rows = WORKLOADS[name], ("ETHER", "ETHER+", LORA)
    base, _ = build(workload)
    times: dict[str, dict[str, list[float]]] = {row: {} for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            pipe, path = empty_pipeline(workload, adapted(base, row, workload.targets)), Path(folder, row)
            if row == LORA:
                name = denoiser_name(pipe)
                tensors = get_peft_model_state_dict(getattr(pipe, name))
                pipe.save_lora_weights(path, **{f"{name}_lora_layers": tensors})
            else:
                pipe.save_ether_weights(path)
        for _ in range(1 + rounds):  # the first is for warming up
            for row in rows:
                for what, taken in one_life(workload, share(base), Path(folder, row), row == LORA).items():
                    times[row].setdefault(what, []).append(taken)
    calls = {row: {what: each[1:] for what, each in held.items()} for row, held in times.items()}
    return {
        row: {
            what: {
                "seconds": statistics.median(own),
                "ratio": statistics.median(a / b for a, b in zip(own, calls[LORA][what], strict=True)),
            }
            for what, own in held.items()
        }
        for row, held in calls.items()
    }


def one_life(workload: Workload, denoiser: nn.Module, path: Path, lora: bool) -> dict[str, float]:
    """Seconds of every call in the life of an adapter on a pipeline."""
    pipe = empty_pipeline(workload, denoiser)
    load = pipe.load_lora_weights if lora else pipe.load_ether_weights
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: load(path, adapter_name="a"),
        "activate": lambda: pipe.set_adapters("a", 0.9),
        "fuse": pipe.fuse_lora if lora else pipe.fuse_ether,
        "unfuse": pipe.unfuse_lora if lora else pipe.unfuse_ether,
        "unload": pipe.unload_lora_weights if lora else pipe.unload_ether_weights,
    }
    return {what: seconds(call, workload.device) for what, call in calls.items()}


def main() -> None:
    args = read_workloads(make_parser(__doc__))
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")  # of models that carry adapters already
    for name in args.workloads:
        report = {"workload": name, "machine": machine(), "rounds": args.rounds}
        report["step"] = denoising(name, args.rounds)
        print(f"\n{name:22}{'step':>10}{'ratio':>8}{'quartiles':>16}")
        for row, timing in report["step"].items():
            print(
                f"{row:22}{timing['seconds'] * 1e3:>7.0f} ms{timing['ratio']:>8.3f}"
                f"{timing['ratio_low']:>9.3f}–{timing['ratio_high']:.3f}"
            )
        if WORKLOADS[name].pipeline is not None:
            report["loading"] = loading(name, min(args.rounds, 10))
            print("\n" + " " * 12 + "".join(f"{what:>18}" for what in report["loading"][LORA]))
            for row, calls in report["loading"].items():
                cells = [f"{call['seconds'] * 1e3:>8.1f} ms ({call['ratio']:.2f})" for call in calls.values()]
                print(f"{row:12}" + "".join(f"{cell:>18}" for cell in cells))
        write_json(args.output_dir / f"inference_{name}.json", report)
        gc.collect()


if __name__ == "__main__":
    main()
