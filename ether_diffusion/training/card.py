"""The model card: what was trained, on what, with which command, and how to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.checkpoint import WEIGHTS_NAME
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.loop import TrainingResult

CARD_NAME, GRID_NAME = "README.md", "grid.png"


def launch_command(script: str, arguments: Sequence[str]) -> str:
    """The command as it was typed, but for the place of the script."""
    return shlex.join(["accelerate", "launch", Path(script).name, *arguments])


def write_card(
    folder: Path,
    *,
    source: ModelSource,
    method: str,
    prompt: str,
    prompts: Sequence[str],
    parameters: int,
    learning_rate: float,
    command: str,
    result: TrainingResult,
    with_pictures: bool,
) -> Path:
    """Write `README.md` beside the adapter and return its path.

    Args:
        folder: the output folder.
        source: the base model; a local path appears by its last part alone.
        method, learning_rate, parameters: what was trained.
        prompt: the instance prompt; `prompts`: those of the sample pictures.
        command: as typed.
        result: of the training.
        with_pictures: whether the grid is there.
    """
    title = {"ether": "ETHER", "ether_plus": "ETHER+"}[method]
    header = {
        "library_name": "diffusers",
        "tags": ["ether", "peft", "diffusers", "text-to-image", "dreambooth"],
        "instance_prompt": prompt,
    }
    if source.on_hub:  # the Hub only takes ids of its own models here
        header["base_model"] = source.path
    yaml = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items())
    loading = (
        "from ether_diffusion import miniature\n\npipe = miniature.load_pipeline()"
        if source.is_miniature
        else f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({source.name!r})"
    )
    samples = ""
    if with_pictures:
        listed = "\n".join(f"- {each}" for each in prompts)
        samples = f"\n## Samples\n\nBase and tuned model from the same seeds:\n\n{listed}\n\n![samples]({GRID_NAME})\n"
    last = result.losses[-50:]
    text = f"""---
{yaml}
---

# {title} adapter: {prompt}

A DreamBooth adapter for **{source.name}**, trained with {title}
([arXiv:2405.20271](https://arxiv.org/abs/2405.20271)): {parameters:,} parameters in `{WEIGHTS_NAME}`
({(folder / WEIGHTS_NAME).stat().st_size / 1024:.0f} kB).
{samples}
## Use

```python
import ether_diffusion
{loading}
pipe.load_ether_weights("{folder.name}")
image = pipe({prompt!r}).images[0]
```

## Training

{len(result.losses)} steps in {result.seconds:.0f} s at learning rate {learning_rate:g}; mean loss of the last
{len(last)} steps: {sum(last) / len(last):.4f}.

```
{command}
```
"""
    path = folder / CARD_NAME
    path.write_text(text, "utf-8")
    return path
