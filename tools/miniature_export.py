"""How the miniatures are written: float16 files whose configs say float32."""

from __future__ import annotations

import json
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
    # Without T5 diffusers writes no entry for it, and then cannot open what it has written.
    index_path = partial / pipe.config_name
    index = json.loads(index_path.read_text())
    index |= {name: [None, None] for name, part in pipe.components.items() if part is None}
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in partial.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a place on this machine
        path.write_text(json.dumps(config, indent=2).replace('"float16"', '"float32"') + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    log(f"{folder}: {size / 1e6:.1f} MB")
