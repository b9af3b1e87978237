"""Base models: the miniatures that are shipped, by their names, and opening any pipeline as it was saved."""

from __future__ import annotations

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


def base_path(model: str | Path) -> str:
    """Where a base model lies: the folder of a miniature for its name, anything else as it is."""
    return str(MINIATURES.get(str(model), model))


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
    """
    path, kind = base_path(base), kind or diffusers.DiffusionPipeline
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
