"""Base models: the miniatures that are shipped, by their names, and opening any pipeline as it was saved."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from ether_diffusion.dtypes import DTYPES

if TYPE_CHECKING:  # diffusers imports its pipelines when one is opened
    from diffusers import DiffusionPipeline

MINIATURES = {
    "miniature": Path(__file__).parent / "miniature" / "weights",
    "miniature-dit": Path(__file__).parent / "miniature" / "weights_dit",
}
"""The pipeline folders that are shipped with the package, by the names under which commands take them."""
MINIATURE = "miniature"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt")

logger = logging.getLogger(__name__)


def base_path(model: str | Path) -> str:
    """Where a base model lies: the folder of a miniature for its name, anything else as it is."""
    return str(MINIATURES.get(str(model), model))


def missing_locally(place: str | Path, kind: str = "folder") -> str | None:
    """One sentence on a file or folder that is not there, where a place is plainly no id on the Hub; else None.

    That is a path that no id can be, one into a folder that is there, or a single word. It is told before anybody
    asks the network, which would blame itself. kind: of what is looked for, in words.
    """
    text, path = str(place), Path(place).expanduser()
    if path.exists() or text in MINIATURES:
        return None
    kind = "file" if path.suffix in WEIGHT_SUFFIXES else kind
    nothing = f"there is no such {kind}{_similar(path)}"
    if "/" not in text and "\\" not in text:
        words = f"an id on the Hub has two parts (owner/name), the miniatures are called {' and '.join(MINIATURES)}"
        return nothing if kind == "file" else f"{nothing}; {words}"
    spelled = text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1
    return nothing if spelled or kind == "file" or path.parent.is_dir() else None


def _similar(path: Path) -> str:
    """In a sentence on a path that is not there: what may be meant, of what lies beside it."""
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def miniature_name(model: str | Path) -> str | None:
    """The name of the miniature that a path is the folder of, or that is named; None for other models."""
    place = Path(base_path(model)).resolve()
    return next((name for name, folder in MINIATURES.items() if place == folder.resolve()), None)


def public_name(miniature: str) -> str:
    """What files and cards call a miniature."""
    return f"ether-diffusion {miniature}"


def open_pipeline(
    base: str | Path,
    kind: type[DiffusionPipeline] | None = None,
    *,
    revision: str | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """`kind.from_pretrained`, also of what was saved without a component that its class asks for, as SD3 without T5.

    base: a folder, an id on the Hub, or the name of a miniature. kind: default: what the base was saved as. options:
    as `from_pretrained` takes them.

    Raises:
        FileNotFoundError: the base is plainly a path on this machine, and not there.
    """
    path, kind = base_path(base), kind or diffusers.DiffusionPipeline
    if problem := missing_locally(path):
        raise FileNotFoundError(f"{base}: {problem}")
    index = kind.load_config(path, revision=revision)
    return kind.from_pretrained(path, revision=revision, **{**absent_components(index), **options})


def open_for_inference(
    base: str | Path,
    kind: type[DiffusionPipeline] | None = None,
    *,
    dtype: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """A pipeline to generate with, on its device and without progress bars.

    dtype: by torch's name; default: float16 on a GPU, else float32. device: default: a GPU where there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "float16" and device.type == "cpu":
        logger.warning("float16 on a CPU is many times slower than float32; take float32 or bfloat16 there")
    precision = DTYPES[dtype or ("float16" if device.type == "cuda" else "float32")]
    pipe = open_pipeline(base, kind, dtype=precision, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def absent_components(index: Mapping[str, Any]) -> dict[str, None]:
    """The components that a pipeline of this `model_index.json` was saved without, and that its class asks for.

    Diffusers opens such a folder only if it is told, which is as for a folder that has the component.
    """
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    optional = getattr(kind, "_optional_components", ())
    empty = {name for name, entry in index.items() if isinstance(entry, list | tuple) and [*entry] == [None, None]}
    return dict.fromkeys(sorted(empty - {*optional}))
