"""What an adapter costs at inference: a denoising step, and loading, against no adapter and against LoRA.

    python benchmarks/inference.py --output_dir out/benchmarks                        # a small UNet, any CPU
    python benchmarks/inference.py --output_dir out/benchmarks --workloads sd15-512 sdxl-1024

Every row's step is timed between two steps of the model without an adapter; reported are the median of those ratios
and their quartiles. "kept" is the model with `enable_ether_attention`. Loading is timed from a file into a pipeline,
and activation is `set_adapters` from one loaded adapter to another. Weights are random: times do not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from measuring import machine, paired, seconds
from peft.utils import get_peft_model_state_dict
from torch import nn
from workloads import WORKLOADS, adapted, build, share

from ether_diffusion import enable_ether_attention
from ether_diffusion.layers import EtherLayer

NONE = "no adapter"


def fused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, EtherLayer):
            weight = module.get_base_layer().weight
            module.get_base_layer().weight = nn.Parameter(weight.detach().clone(), requires_grad=False)  # its own
            module.merge()
    return model


def kept(model: nn.Module) -> nn.Module:
    enable_ether_attention(model)
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
    if hasattr(base, "conv_in"):
        models |= {"ETHER, kept": kept(of("ETHER")), "ETHER+, kept": kept(of("ETHER+"))}
    steps = {row: make_step(model, inputs) for row, model in models.items()}
    return paired(make_step(base, inputs), steps, rounds, workload.device)


def empty_pipeline(unet: nn.Module) -> StableDiffusionPipeline:
    names = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(unet=unet, **dict.fromkeys(names), requires_safety_checker=False)


def loading(name: str, rounds: int) -> dict:
    """Median seconds to load an adapter from a file, and to activate another one."""
    workload, rows = WORKLOADS[name], {}
    base, _ = build(workload)
    with tempfile.TemporaryDirectory() as folder:
        for row, method in {"ETHER": "ETHER", "ETHER+": "ETHER+", "LoRA r=4": "LoRA r=4"}.items():
            pipe, path = empty_pipeline(adapted(base, method, workload.targets)), Path(folder, row)
            lora = row.startswith("LoRA")
            if lora:
                pipe.save_lora_weights(path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
            else:
                pipe.save_ether_weights(path)
            times: dict[str, list[float]] = {"load": [], "activate": []}
            for _ in range(rounds):
                pipe = empty_pipeline(share(base))
                load = pipe.load_lora_weights if lora else pipe.load_ether_weights
                times["load"].append(seconds(lambda: load(path, adapter_name="a"), workload.device))  # noqa: B023
                load(path, adapter_name="b")
                times["activate"].append(seconds(lambda: pipe.set_adapters("a"), workload.device))  # noqa: B023
            rows[row] = {what: statistics.median(each) for what, each in times.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cpu-small"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if any(WORKLOADS[name].device == "cuda" for name in args.workloads) and not torch.cuda.is_available():
        parser.error("this workload needs a CUDA device; cpu-small runs anywhere")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.workloads:
        report = {"workload": name, "machine": machine(), "rounds": args.rounds}
        report["step"] = denoising(name, args.rounds)
        print(f"\n{name:22}{'step':>10}{'ratio':>8}{'quartiles':>16}")
        for row, timing in report["step"].items():
            print(
                f"{row:22}{timing['seconds'] * 1e3:>7.0f} ms{timing['ratio']:>8.3f}"
                f"{timing['ratio_low']:>9.3f}–{timing['ratio_high']:.3f}"
            )
        if name != "flux2-klein-512":  # its pipeline is another
            report["loading"] = loading(name, min(args.rounds, 5))
            print(f"\n{'':22}{'load':>10}{'activate':>12}")
            for row, times in report["loading"].items():
                print(f"{row:22}{times['load'] * 1e3:>7.0f} ms{times['activate'] * 1e3:>9.1f} ms")
        (args.output_dir / f"inference_{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
