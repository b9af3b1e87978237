"""The model card: what was trained, on what, with which command, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from ether_diffusion.base_models import MINIATURE, absent_components
from ether_diffusion.training.checkpoint_files import PREFIX
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.memory import format_bytes
from ether_diffusion.training.methods.configs import Method

CARD_NAME, GRID_NAME = "README.md", "grid.png"
TEMPLATE = Path(__file__).with_name("card_template.md")

CONTROL_NAME = "control.png"
"""The control image that a card's code uses."""
WHERE, BASE, CONTROL = "{where}", "{base}", "{control}"
"""In a card's lines of code: the places of the weights and of a base model on this machine, as Python strings, and an
expression for the path of the control image."""

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


@dataclass(frozen=True, kw_only=True)
class CardContent:
    """What a model card says.

    source: the base model; in an upload, a local path appears by its last part alone.
    method: what was trained, and the paper it is from.
    tags: for the Hub's search, besides those of every card.
    loading: lines of Python that put the result on `pipe`, the base model, or that begin with `pipe = ` and need none;
        what they import first is listed with the rest. `{where}` in them becomes the folder as it was named when the
        training was called, or the repository's id, in quotes: `pipe.load_ether_weights({where})`; `{base}` and
        `{control}` likewise the place of the base model and the path of `control.png` in the folder.
    weights: file with the result, or the folder where there are several; its name and size are stated.
    prompt: the instance prompt; `prompts`: those of the sample images, none where there are no images.
    figures: name -> text, see `figures_of`.
    command: as typed.
    inputs: what `pipe` is called with besides the prompt, as code.
    hub_id: the repository that the folder is uploaded to.
    """

    source: ModelSource
    method: Method
    tags: Sequence[str]
    loading: str
    weights: Path
    prompt: str
    prompts: Sequence[str]
    figures: Mapping[str, str]
    command: str
    inputs: str = ""
    hub_id: str | None = None


def write_card(folder: Path, content: CardContent) -> Path:
    """Write `README.md` into the output folder and return its path."""
    source, weights = content.source, content.weights
    data = ModelCardData(
        library_name="diffusers",
        tags=["diffusers", "text-to-image", *content.tags],
        base_model=source.path if source.on_hub else None,  # the Hub only takes ids of its own models here
        instance_prompt=content.prompt,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=content.method.title,
        paper=content.method.paper,
        prompt=_span(content.prompt),
        base=source.name,
        place="this folder" if weights.resolve() == folder.resolve() else _span(weights.name),
        size=format_bytes(size_of(weights)),
        prompts=[_span(each) for each in content.prompts],
        grid=GRID_NAME,
        usage=_block(_usage(content, folder), "python"),
        figures=[(_cell(name), _cell(text)) for name, text in content.figures.items()],
        command=_block(content.command),
    )
    path = folder / CARD_NAME
    card.save(path)
    return path


def opening(source: ModelSource, kind: type[DiffusionPipeline] = DiffusionPipeline, inputs: str = "") -> str:
    """Lines of Python that open the base model as `pipe`.

    Args:
        source: the base model.
        kind: class of the pipeline.
        inputs: what its `from_pretrained` takes besides, as code.
    """
    if source.miniature and kind is DiffusionPipeline:
        given = "" if source.miniature == MINIATURE else repr(source.miniature)
        return f"from ether_diffusion import miniature\npipe = miniature.load_pipeline({given})"
    if source.configs is not None and kind is DiffusionPipeline:  # which cannot tell what a file holds
        kind = getattr(diffusers, source.config()["_class_name"])
    imports = [f"from {kind.__module__.partition('.')[0]} import {kind.__name__}"]
    options = {"revision": source.revision, "variant": source.variant}
    name = BASE if Path(source.path).exists() else repr(source.name)
    given = [name, *(f"{name}={value!r}" for name, value in options.items() if value is not None)]
    if source.miniature:
        imports = [*imports, "from ether_diffusion import miniature"]
        given = [f"miniature.FOLDERS[{source.miniature!r}]"]
    if Path(source.path).is_dir():  # a model on the Hub has all components
        given += [f"{name}=None" for name in absent_components(source.config())]
    given += [inputs] if inputs else []
    reader = "from_pretrained" if source.configs is None else "from_single_file"
    return "\n".join([*imports, f"pipe = {kind.__name__}.{reader}({', '.join(given)})"])


def _usage(content: CardContent, folder: Path) -> str:
    """The Python code that generates a first image, where the training was called or, of an upload, anywhere."""
    lines = content.loading.splitlines()
    if not any(line.startswith("pipe = ") for line in lines):
        lines = [*opening(content.source).splitlines(), *lines]
    where, source = content.hub_id or str(folder), content.source
    places = {WHERE: _quoted(where), BASE: _quoted(source.name if content.hub_id else source.path)}
    places[CONTROL] = _quoted(str(folder / CONTROL_NAME))
    if content.hub_id:
        places[CONTROL] = f"hf_hub_download({_quoted(where)}, {_quoted(CONTROL_NAME)})"
        lines = ["from huggingface_hub import hf_hub_download"] * any(CONTROL in line for line in lines) + lines
    lines = [_filled(line, places) for line in lines]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    lines = [line for line in lines if line.strip() and line not in imports]
    call = ", ".join([f"prompt={content.prompt!r}", *([content.inputs] if content.inputs else [])])
    return "\n".join([*dict.fromkeys(imports), "", *lines, f"image = pipe({call}).images[0]"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _filled(line: str, places: Mapping[str, str]) -> str:
    """A line of code with its places, each of which may look like the name of another."""
    return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], line)


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
