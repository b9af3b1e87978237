"""A base to serve, and random adapters for it, on pipelines and as files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from workloads import ATTENTION

from ether_diffusion import EtherConfig
from ether_diffusion.base_models import open_for_inference

METHODS = {
    "ETHER": lambda: EtherConfig(method="ether", init_weights=False, target_modules=ATTENTION),
    "ETHER+": lambda: EtherConfig(method="ether_plus", init_weights=False, target_modules=ATTENTION),
    "LoRA r=4": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=ATTENTION),
}


def open_base(base: str) -> DiffusionPipeline:
    """On the CPU, without gradients and progress bars."""
    pipe = open_for_inference(base, dtype="float32", device="cpu")
    pipe.unet.requires_grad_(False)
    return pipe


def with_adapters(base: str, method: str, names: list[str], seed: int) -> DiffusionPipeline:
    """A pipeline with random adapters of a method on its UNet; adapter k is the same for every number of them."""
    pipe = open_base(base)
    for k, name in enumerate(names):
        torch.manual_seed(seed + k)
        pipe.unet.add_adapter(METHODS[method](), adapter_name=name)
    return pipe


def write_adapters(base: str, method: str, folder: Path, count: int, seed: int) -> list[Path]:
    """Files of so many random adapters of a method, ETHER or ETHER+."""
    folder.mkdir(parents=True)
    names = [f"{method}-{k}" for k in range(count)]
    pipe = with_adapters(base, method, names, seed)
    files = []
    for name in names:
        pipe.save_ether_weights(folder / name, name)
        (file,) = (folder / name).glob("*.safetensors")
        files.append(file)
    return files


def link_names(files: list[Path], folder: Path, count: int, prefix: str = "adapter-") -> list[str]:
    """So many names in a folder of adapters, each a link to one of these files in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}{number}" for number in range(count)]
    for number, name in enumerate(names):
        os.link(files[number % len(files)], folder / f"{name}.safetensors")
    return names
