"""HTML that the tabs share. Whatever comes from a file or a user is escaped here."""

from __future__ import annotations

from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from ether_diffusion.images import DAMAGE

THUMBNAIL = 160
LARGEST_IMAGE = 4_000_000
STRENGTH_NOTE = (
    "0 is the base model, bit for bit; 1 is the adapter as it was trained. In between and beyond, weights are mixed: "
    "only at 0 and 1 do they keep their norms. At 0.5 plain ETHER erases the learned direction; above 1 it overshoots."
)


def status(text: str) -> str:
    return f'<div class="ether-status" role="status" aria-live="polite">{escape(text)}</div>'


def problem(text: str) -> str:
    return f'<div class="ether-problem" role="alert">{escape(text)}</div>'


def progress(text: str, done: float) -> str:
    """A line of text over a bar; `done` from 0 to 1."""
    bar = f'<progress value="{done:.3f}" max="1" aria-label="Progress"></progress>'
    return f'<div class="ether-status" role="status" aria-live="polite">{escape(text)}{bar}</div>'


def tooltip(label: str, text: str) -> str:
    """A line that opens to a longer text."""
    paragraphs = "<br>".join(escape(line) for line in text.splitlines())
    return f'<details class="ether-note"><summary>{escape(label)}</summary>{paragraphs}</details>'


def thumbnail(path: Path | None) -> Image.Image | None:
    """A small copy; None where there is no file, or it is no image."""
    return None if path is None else _thumbnail(path, path.stat().st_mtime_ns)


def placeholder() -> Image.Image:
    """What is shown of an adapter without an image."""
    return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#8a8fa3")


@lru_cache(maxsize=1024)
def _thumbnail(path: Path, _stamp: int) -> Image.Image | None:
    try:
        if path.stat().st_size > LARGEST_IMAGE:
            return None
        with Image.open(path) as image:
            small = image.convert("RGB")
    except DAMAGE:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small
