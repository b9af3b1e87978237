"""HTML that the tabs share. Whatever comes from a file or a user is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from ether_diffusion.demo.library import Adapter
from ether_diffusion.images import DAMAGE
from ether_diffusion.tuner.config import METHOD_NAMES

THUMBNAIL = 160
LARGEST_IMAGE = 4_000_000
STRENGTH_NOTE = (
    "0 is the base model, bit for bit; 1 is the adapter as it was trained. In between and beyond, weights are mixed: "
    "only at 0 and 1 do they keep their norms. At 0.5 plain ETHER erases the learned direction; above 1 it overshoots."
)


def note(text: str) -> str:
    return f'<div class="ether-note">{escape(text)}</div>'


def status(text: str) -> str:
    return f'<div class="ether-status" role="status">{escape(text)}</div>'


def problem(text: str) -> str:
    return f'<div class="ether-problem" role="alert">{escape(text)}</div>'


def progress(text: str, done: float) -> str:
    """A line of text over a bar; `done` from 0 to 1."""
    bar = f'<progress value="{done:.3f}" max="1" aria-label="{escape(text)}"></progress>'
    return f'<div class="ether-status">{escape(text)}{bar}</div>'


def cards(adapters: Iterable[tuple[Adapter, str]]) -> str:
    """Adapters, each with whether it fits, as cards."""
    shown = "".join(_card(adapter, fit) for adapter, fit in adapters)
    return f'<ul class="ether-cards">{shown}</ul>' if shown else status("There is no adapter in the folder yet.")


def _card(adapter: Adapter, fit: str) -> str:
    image = ""
    if adapter.image is not None:
        stamp = adapter.image.stat().st_mtime_ns
        if source := _thumbnail(adapter.image, stamp):
            image = f'<img src="{source}" alt="Sample of {escape(adapter.name)}">'
    kind = ", ".join([METHOD_NAMES[method] for method in adapter.methods] + ["control"] * adapter.is_control)
    return (
        f"<li>{image}<div><strong>{escape(adapter.name)}</strong><br>{escape(adapter.prompt) or '–'}<br>"
        f"<small>{escape(kind)} · {adapter.parameters:,} parameters · {adapter.size:,} bytes<br>{escape(fit)}"
        "</small></div></li>"
    )


@lru_cache(maxsize=256)
def _thumbnail(path: Path, _stamp: int) -> str:
    """A small copy as a data address; empty where the file is no image."""
    try:
        if path.stat().st_size > LARGEST_IMAGE:
            return ""
        with Image.open(path) as image:
            small = image.convert("RGB")
    except DAMAGE:
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
