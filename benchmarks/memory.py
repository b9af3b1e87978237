"""How much memory of the GPU a step of DreamBooth training takes at full size: an estimate without a GPU, or measured.

    python benchmarks/memory.py --output_dir out/benchmarks                      # an estimate, on any machine
    python benchmarks/memory.py --output_dir out/benchmarks --device cuda        # the allocator's own count

Batch 1, fp16 as the training script has it: frozen weights in half precision, what is trained in float32, autocast.
The estimate runs the step on tensors without data and adds up the storages that are alive, each rounded to the 512
bytes of CUDA's allocator. Norms compute in float32, as CUDA's autocast has it, and attention keeps no score matrix, as
in its flash kernel. Left out: CUDA's context (some 0.3 to 0.5 GB), workspaces of cuDNN and cuBLAS, fragmentation, and
what AdamW makes in passing. BOFT reads its permutations from data, so there is no estimate for it; `--device cpu`
counts the same on tensors with data.

Without cached latents the peak covers a step that encodes its image. With --cache_latents and
--pre_compute_text_embeddings it is that of the steps; the encoding before them takes what is listed for it. Prints a
table and writes JSON. Weights are random: memory does not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from measuring import CudaBytes, LiveBytes, machine, make_parser
from result_file import write_json
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from workloads import WORKLOADS, Workload, build, unet_inputs

from ether_diffusion.training.families import StableDiffusion
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import add_adapters
from ether_diffusion.training.objectives import sample_losses
from ether_diffusion.training.optimizers import make_optimizer, parameter_groups
from ether_diffusion.training.options import METHODS, AdapterOptions, OptimizationOptions

LEFT_OUT = [
    "CUDA context",
    "workspaces of cuDNN and cuBLAS",
    "fragmentation",
    "what AdamW makes in passing when it steps all parameters at once (full: about as much as the weights)",
]
VAE_FACTOR = 8


def autoencoder() -> AutoencoderKL:
    """That of Stable Diffusion, 1.5 and XL alike: 84 M parameters."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def clip_l() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


def open_clip_bigg() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
    )


@dataclass(frozen=True)
class Pipeline:
    """A denoiser with one sample for it, the text encoders beside it, and how its autoencoder computes."""

    denoiser: Workload
    text_encoders: tuple[Callable[[], nn.Module], ...] = (clip_l,)
    float32_autoencoder: bool = False
    checkpointing: tuple[bool, ...] = (False, True)


PIPELINES = {
    "cpu-small": Pipeline(dataclasses.replace(WORKLOADS["cpu-small"], inputs=lambda: unet_inputs(1, 16, 768))),
    "sd15-512": Pipeline(dataclasses.replace(WORKLOADS["sd15-512"], inputs=lambda: unet_inputs(1, 64, 768))),
    "sdxl-1024": Pipeline(
        WORKLOADS["sdxl-1024"], (clip_l, open_clip_bigg), float32_autoencoder=True, checkpointing=(True,)
    ),
}


@contextlib.contextmanager
def norms_in_float32() -> Iterator[None]:
    """Norms as CUDA's autocast computes them; that of the CPU leaves them in half precision."""
    found = {name: getattr(F, name) for name in ("layer_norm", "group_norm")}

    def wide(value: object) -> object:
        return value.float() if isinstance(value, Tensor) and torch.is_autocast_enabled("cpu") else value

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **given: function(*map(wide, args), **{name: wide(each) for name, each in given.items()})

    for name, function in found.items():
        setattr(F, name, widened(function))
    try:
        yield
    finally:
        for name, function in found.items():
            setattr(F, name, function)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Tensors without data; modules that hold them can be cast, for which torch would swap the tensors and fail."""

    def cast(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            cast(child, function)
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                tensor.data = function(tensor.detach())
        return self

    found = nn.Module._apply
    nn.Module._apply = cast
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.Module._apply = found


@contextlib.contextmanager
def counting(device: str) -> Iterator[LiveBytes | CudaBytes]:
    """Everything inside is counted: on a GPU, on the CPU, or as an estimate on tensors without data."""
    if device == "cuda":
        yield CudaBytes()
        return
    with without_data() if device == "estimate" else contextlib.nullcontext(), norms_in_float32():
        with LiveBytes() as meter:
            yield meter


def measure(pipeline: Pipeline, method: str, *, checkpointing: bool, device: str) -> dict[str, int]:
    """Bytes of the parts of a training step, and its peak, with all components on the device.

    Returns:
        denoiser, encoders: weights. trained: what is trained (beyond the model's own weights), and its moments.
        activations: kept for the backward pass. step: peak of the step without the encoders. encoding: peak while a
        image is encoded, beyond all weights.
    """
    gc.collect()  # the model before this one
    options = AdapterOptions(method=method)
    configs = configs_of(read_method(options), StableDiffusion, options)
    # As `TrainingRun.load`: weights that are all trained are kept in float32.
    dtype = torch.float32 if None in configs.values() else torch.float16
    placed = {"device": "cuda" if device == "cuda" else "cpu", "dtype": dtype}
    with counting(device) as meter:
        unet, inputs = build(dataclasses.replace(pipeline.denoiser, **placed))
        found = {"denoiser": meter.now()}
        add_adapters({"unet": unet}, configs, seed=0)
        optimization = OptimizationOptions(learning_rate=1e-4)
        groups = parameter_groups({"unet": unet}, denoiser="unet", options=optimization)
        optimizer = make_optimizer(groups, optimization)
        parameters = [parameter for group in groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
        found["trained"] = meter.now() - found["denoiser"]
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        target = torch.randn_like(inputs["sample"], dtype=torch.float32)
        before = meter.restart()
        with torch.autocast(placed["device"], torch.float16):
            loss = sample_losses(unet(**inputs, return_dict=False)[0], target).mean()
        found["activations"] = meter.now() - before
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        del loss
        found["step"] = meter.peak()
        before = meter.now()
        encoders = [
            build(dataclasses.replace(pipeline.denoiser, build=make, inputs=dict, **placed))[0]
            for make in (autoencoder, *pipeline.text_encoders)
        ]
        found["encoders"] = meter.now() - before
        before = meter.restart()
        encode(encoders[0], inputs["sample"], pipeline.float32_autoencoder)
        found["encoding"] = meter.peak() - before
    return found


@torch.no_grad()
def encode(vae: AutoencoderKL, latents: Tensor, in_float32: bool) -> None:
    """Encode one image that has these latents' size, as the families do."""
    height, width = (VAE_FACTOR * side for side in latents.shape[-2:])
    dtype = torch.float32 if in_float32 else vae.dtype
    nn.Module.to(vae, dtype)  # past ModelMixin.to, which logs a warning
    with torch.autocast(latents.device.type, torch.float16, enabled=not in_float32):
        vae.encode(torch.zeros(1, 3, height, width, device=latents.device, dtype=dtype))


def rows_of(name: str, methods: list[str], device: str) -> Iterator[dict]:
    """For every method and setting: bytes on the device with the encoders on it, and with their answers cached."""
    for method in methods:
        for checkpointing in PIPELINES[name].checkpointing:
            found = measure(PIPELINES[name], method, checkpointing=checkpointing, device=device)
            everything = found["denoiser"] + found["trained"] + found["encoders"]
            for cached in (False, True):
                encoders = 0 if cached else found["encoders"]
                peak = found["step"] + encoders
                yield {
                    "workload": name,
                    "method": method,
                    "gradient_checkpointing": checkpointing,
                    "cached": cached,
                    "weights": found["denoiser"] + encoders,
                    "trained_and_optimizer": found["trained"],
                    "activations": found["activations"],
                    "encoding": everything + found["encoding"],
                    "peak": peak if cached else max(peak, everything + found["encoding"]),
                }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("estimate", "cpu", "cuda"), default="estimate")
    parser.add_argument("--workloads", nargs="+", choices=PIPELINES, default=["sd15-512", "sdxl-1024"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[each for each in METHODS if each != "boft"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; estimate runs anywhere")
    if args.device == "estimate" and "boft" in args.methods:
        parser.error("--methods boft: it reads its permutations from data; needs --device cpu or cuda")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    columns = ("weights", "trained_and_optimizer", "activations", "encoding", "peak")
    titles = "".join(f"{title:>11}" for title in ("weights", "trained", "kept", "encoding", "peak"))
    print(f"{'':24}{'checkpointing':>14}{'cached':>8}{titles}")
    rows = []
    for name in args.workloads:
        for row in rows_of(name, args.methods, args.device):
            rows.append(row)
            checkpointing, cached = ("yes" if row[flag] else "no" for flag in ("gradient_checkpointing", "cached"))
            sizes = "".join(f"{format_bytes(row[column]):>11}" for column in columns)
            print(f"{name:12}{row['method']:12}{checkpointing:>14}{cached:>8}{sizes}", flush=True)
    report = {"machine": machine(), "device": args.device, "batch": 1, "precision": "fp16"}
    if args.device != "cuda":
        report["left_out"] = LEFT_OUT
    write_json(args.output_dir / "memory.json", {**report, "rows": rows})


if __name__ == "__main__":
    main()
