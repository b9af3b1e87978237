"""How the miniatures are written: float16 files whose configs say float32."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from miniature_training import log
from torch import nn


def write_pipeline(pipe: DiffusionPipeline, folder: Path, **beside: nn.Module) -> None:
    """Write the pipeline folder and, in folders beside its parts, other models.

    Diffusers loads a float16 file as float32 unless told otherwise; transformers takes the type from the config.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    parts = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    for part in (*parts, *beside.values()):
        part.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    pipe.save_pretrained(partial)
    for name, model in beside.items():
        model.save_pretrained(partial / name)
    for config in partial.glob("*/config.json"):
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    log(f"{folder}: {size / 1e6:.1f} MB")
