"""Charts as SVG: they need no script, follow the theme and can be read out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, ROW, LABEL = 640, 16, 320


def line_chart(values: Sequence[float], label: str, *, length: int) -> str:
    """Values from left to right; `length` of them fill the width."""
    if not values:
        return ""
    height, top = 120, max(values) or 1.0
    points = " ".join(
        f"{WIDTH * k / max(length - 1, 1):.1f},{height - (height - 8) * value / top:.1f}"
        for k, value in enumerate(values)
    )
    words = f"{label}: {values[-1]:.4f} after {len(values)}, from {values[0]:.4f}"
    return (
        f'<figure class="ether-chart"><svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        f'aria-label="{escape(words)}"><polyline points="{points}" fill="none" stroke="currentColor" '
        f'stroke-width="1.5"/></svg><figcaption>{escape(words)}</figcaption></figure>'
    )


def bar_chart(bars: Sequence[tuple[str, float]], label: str, *, unit: str = "", top: float | None = None) -> str:
    """A bar for every (name, value), one below the other."""
    if not bars:
        return ""
    height, top = ROW * len(bars) + 4, top or max(value for _, value in bars) or 1.0
    room = WIDTH - LABEL - 60
    rows = "".join(
        f'<text x="{LABEL - 6}" y="{ROW * k + 12}" text-anchor="end">{escape(_tail(name))}</text>'
        f'<rect x="{LABEL}" y="{ROW * k + 3}" width="{room * value / top:.1f}" height="{ROW - 5}"/>'
        f'<text x="{LABEL + room * value / top + 5:.1f}" y="{ROW * k + 12}">{value:.1f}{escape(unit)}</text>'
        for k, (name, value) in enumerate(bars)
    )
    return (
        f'<figure class="ether-chart"><figcaption>{escape(label)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" '
        f'width="100%" role="img" aria-label="{escape(label)}; the table has the numbers">{rows}</svg></figure>'
    )


def _tail(name: str) -> str:
    return name if len(name) <= 52 else f"…{name[-51:]}"
