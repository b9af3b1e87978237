"""What a batch with an adapter for each row costs: a denoising step of the miniature's UNet, against no adapter.

    python benchmarks/mixed_batches.py --output_dir out/benchmarks
    python benchmarks/mixed_batches.py --output_dir out/benchmarks --quick

A batch of eight rows. "Rows" are those of `ether_diffusion.serving.rows`; LoRA is mixed by PEFT's `adapter_names`;
eight single calls set the adapter before each. Every row's step is timed between two steps without an adapter;
reported are the median of those ratios and their quartiles. OMP_NUM_THREADS=1 makes it one thread.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser, paired
from peft import LoraConfig
from result_file import commit, write_json

from ether_diffusion import EtherConfig
from ether_diffusion.miniature import load_pipeline
from ether_diffusion.serving.rows import AdapterRows
from ether_diffusion.tuner.mixed_batch import adapters_by_row

BATCH, ROUNDS = 8, 60
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = [f"adapter_{k}" for k in range(BATCH)]
CONFIGS = {
    "ETHER": lambda: EtherConfig(method="ether", init_weights=False, target_modules=TARGETS),
    "ETHER+": lambda: EtherConfig(method="ether_plus", init_weights=False, target_modules=TARGETS),
    "LoRA r=4": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS),
}
Step = Callable[[], object]


def pipeline() -> DiffusionPipeline:
    pipe = load_pipeline()
    pipe.unet.requires_grad_(False)
    return pipe


def inputs_of(unet: torch.nn.Module, rows: int) -> tuple[torch.Tensor, ...]:
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, unet.config.in_channels, size, size, generator=generator)
    return latents, torch.full((rows,), 500), torch.randn(rows, 16, width, generator=generator)


@torch.no_grad()
def forward(unet: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return unet(*inputs, return_dict=False)[0]


def attached(method: str, count: int) -> DiffusionPipeline:
    pipe = pipeline()
    for name in NAMES[:count]:
        pipe.unet.add_adapter(CONFIGS[method](), adapter_name=name)
    return pipe


def in_rows(method: str, folder: Path) -> Step:
    """Eight adapters of a method, one in each row."""
    made = attached(method, BATCH)
    for name in NAMES:
        made.save_ether_weights(folder / method / name, name)
    pipe = pipeline()
    table = AdapterRows(pipe, max_rows=BATCH)
    for row, name in enumerate(NAMES, start=1):
        table.assign(row, [(table.read(folder / method / name), 1.0)])
    inputs = inputs_of(pipe.unet, BATCH)

    def step() -> None:
        with table.rows("unet", range(1, BATCH + 1)):
            forward(pipe.unet, inputs)

    return step


def by_peft(method: str) -> Step:
    """Eight adapters of a method, mixed by `adapter_names`."""
    unet = attached(method, BATCH).unet
    inputs = inputs_of(unet, BATCH)

    def step() -> None:
        with adapters_by_row(unet, NAMES):
            forward(unet, inputs)

    return step


def one_for_all(method: str) -> Step:
    unet = attached(method, 1).unet
    return partial(forward, unet, inputs_of(unet, BATCH))


def one_by_one(method: str) -> Step:
    """Eight calls of one row, with the adapter set before each."""
    unet = attached(method, BATCH).unet
    inputs = inputs_of(unet, BATCH)
    parts = [tuple(tensor[k : k + 1] for tensor in inputs) for k in range(BATCH)]

    def step() -> None:
        for name, part in zip(NAMES, parts, strict=True):
            unet.set_adapter(name)
            forward(unet, part)

    return step


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds, to see that it runs")
    args = parser.parse_args()
    unet = pipeline().unet
    reference = partial(forward, unet, inputs_of(unet, BATCH))
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "none, again": partial(forward, copy.deepcopy(unet), inputs_of(unet, BATCH)),
            "one ETHER": one_for_all("ETHER"),
            "8 ETHER, rows": in_rows("ETHER", Path(folder)),
            "8 ETHER+, rows": in_rows("ETHER+", Path(folder)),
            "8 ETHER, adapter_names": by_peft("ETHER"),
            "one LoRA r=4": one_for_all("LoRA r=4"),
            "8 LoRA r=4, adapter_names": by_peft("LoRA r=4"),
            "8 calls, switching ETHER": one_by_one("ETHER"),
            "8 calls, switching LoRA r=4": one_by_one("LoRA r=4"),
        }
        rows = paired(reference, steps, 3 if args.quick else ROUNDS, "cpu")
    print(f"{'a step of 8 rows':<28} {'ms':>8} {'ratio':>6}  quartiles")
    for name, row in rows.items():
        print(
            f"{name:<28} {1e3 * row['seconds']:>8.1f} {row['ratio']:>6.3f}  "
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "mixed_batches.json", {"machine": machine(), "commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
