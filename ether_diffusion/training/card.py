"""The model card: what was trained, on what, with which command, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline

from ether_diffusion.training.checkpoints import PREFIX
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.memory import format_bytes

CARD_NAME, GRID_NAME = "README.md", "grid.png"

WHERE = "{where}"
"""In a card's lines of code: the place of the weights, as a Python string."""

AVERAGED_STEPS = 50


def size_of(weights: Path) -> int:
    """Bytes of a file, or of all weights in a folder but for those of checkpoints."""
    if not weights.is_dir():
        return weights.stat().st_size
    paths = [path.relative_to(weights) for path in weights.rglob("*.safetensors")]
    kept = [path for path in paths if not any(part.startswith((PREFIX, ".")) for part in path.parts)]
    return sum((weights / path).stat().st_size for path in kept)


def figures_of(
    result: TrainingResult,
    *,
    images: str,
    parameters: int,
    weights: Path,
    learning_rates: Mapping[str, float],
) -> dict[str, str]:
    """The figures of a run, name -> text, in the order of the card's table.

    Args:
        result: of the training.
        images: number of training images, in words.
        parameters: number of trained parameters.
        weights: file or folder that holds them.
        learning_rates: of the schedule's plateau, by what has it, e.g. {"denoiser": 1e-3, "text encoder": 5e-4}; the
            name of a single one is not shown.
    """
    steps = len(result.losses)
    count = min(AVERAGED_STEPS, steps)
    rates = [f"{rate:g}" if len(learning_rates) == 1 else f"{name} {rate:g}" for name, rate in learning_rates.items()]
    return {
        "images": images,
        "trained parameters": f"{parameters:,}",
        "size of the weights": format_bytes(size_of(weights)),
        "learning rate": ", ".join(rates),
        "steps": f"{steps:,}",
        f"mean loss, first {count} steps": f"{sum(result.losses[:count]) / count:.4f}",
        f"mean loss, last {count} steps": f"{sum(result.losses[-count:]) / count:.4f}",
        "time": f"{result.seconds:.0f} s",
        "time per step, mean": f"{result.seconds / steps:.3g} s",
        "peak memory": format_bytes(result.peak_memory),
    }


def write_card(
    folder: Path,
    *,
    source: ModelSource,
    title: str,
    tags: Sequence[str],
    paper: str | None,
    loading: str,
    weights: Path,
    prompt: str,
    prompts: Sequence[str],
    figures: Mapping[str, str],
    command: str,
    with_images: bool,
    inputs: str = "",
    hub_id: str | None = None,
) -> Path:
    """Write `README.md` into the output folder and return its path.

    Args:
        folder: the output folder.
        source: the base model; a local path appears by its last part alone.
        title: the method as people write it, e.g. "ETHER+".
        tags: for the Hub's search, besides "diffusers" and "text-to-image".
        paper: the method's arXiv id.
        loading: lines of Python that put the result on `pipe`, the base model, or that begin with `pipe = ` and need
            none; what they import first is listed with the rest. `{where}` in them becomes the folder's name or the
            repository's id, in quotes: `pipe.load_ether_weights({where})`.
        weights: file with the result, or the folder where there are several; its name and size are stated.
        prompt: the instance prompt; `prompts`: those of the sample images.
        figures: name -> text, see `figures_of`.
        command: as typed.
        with_images: whether the grid is there.
        inputs: what `pipe` is called with besides the prompt, as code.
        hub_id: the repository that the folder is uploaded to.
    """
    header = {
        "library_name": "diffusers",
        "tags": list(dict.fromkeys(["diffusers", "text-to-image", *tags])),
        "instance_prompt": prompt,
    }
    if source.on_hub:  # the Hub only takes ids of its own models here
        header["base_model"] = source.path
    reference = "" if paper is None else f" ([arXiv:{paper}](https://arxiv.org/abs/{paper}))"
    samples = ""
    if with_images:
        listed = "\n".join(f"- {_span(each)}" for each in prompts)
        samples = f"\n## Samples\n\nBase and tuned model from the same seeds:\n\n{listed}\n\n![samples]({GRID_NAME})\n"
    rows = "\n".join(f"| {_cell(name)} | {_cell(text)} |" for name, text in figures.items())
    place = "this folder" if weights.resolve() == folder.resolve() else _span(weights.name)
    text = f"""---
{yaml.safe_dump(header, allow_unicode=True, sort_keys=False, width=float("inf")).rstrip()}
---

# {title}: {_span(prompt)}

**{source.name}**, finetuned with {title}{reference}.
The result is in {place}: {format_bytes(size_of(weights))}.
{samples}
## Use

{_block(_usage(source, loading, hub_id or folder.resolve().name, prompt, inputs), "python")}

## Training

| | |
|---|---|
{rows}

{_block(command)}
"""
    path = folder / CARD_NAME
    path.write_text(text, "utf-8")
    return path


def opening(source: ModelSource, kind: type[DiffusionPipeline] = DiffusionPipeline, inputs: str = "") -> str:
    """Lines of Python that open the base model as `pipe`.

    Args:
        source: the base model.
        kind: class of the pipeline.
        inputs: what its `from_pretrained` takes besides, as code.
    """
    if source.is_miniature and kind is DiffusionPipeline:
        return "from ether_diffusion import miniature\npipe = miniature.load_pipeline()"
    imports = [f"from {kind.__module__.partition('.')[0]} import {kind.__name__}"]
    options = {"revision": source.revision, "variant": source.variant}
    given = [repr(source.name), *(f"{name}={value!r}" for name, value in options.items() if value is not None)]
    if source.is_miniature:
        imports, given = [*imports, "from ether_diffusion import miniature"], ["miniature.FOLDER"]
    given += [inputs] if inputs else []
    return "\n".join([*imports, f"pipe = {kind.__name__}.from_pretrained({', '.join(given)})"])


def _usage(source: ModelSource, loading: str, where: str, prompt: str, inputs: str) -> str:
    """The Python code that generates a first image."""
    lines = loading.replace(WHERE, json.dumps(where, ensure_ascii=False)).splitlines()
    if not any(line.startswith("pipe = ") for line in lines):
        lines = [*opening(source).splitlines(), *lines]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    lines = [line for line in lines if line.strip() and line not in imports]
    call = ", ".join([repr(prompt), *([inputs] if inputs else [])])
    return "\n".join([*dict.fromkeys(imports), "", *lines, f"image = pipe({call}).images[0]"])


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _block(code: str, language: str = "") -> str:
    """A fenced block, whatever the code contains."""
    fence = "`" * max(3, _longest_ticks(code) + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _span(text: str) -> str:
    """Text as it is, in one line and without a meaning in Markdown."""
    text = " ".join(text.split())
    ticks = "`" * (_longest_ticks(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
