"""What an adapter's figures mean, in a sentence, and how they look block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SLIGHTLY, FAR = 20.0, 60.0
"""Mean degrees of ETHER+ in a layer. The quickstart's adapter, between them (22° to 58°), lost 0.005 of 0.800 CLIP-T
on prompts without the subject (docs/miniature.md): beyond the upper one nothing was measured."""
BLOCK = re.compile(
    r"^(?P<stage>down_blocks\.\d+|mid_block|up_blocks\.\d+|(?:single_)?transformer_blocks\.\d+|layers\.\d+"
    r"|.*?\.\d+)(?:\.|$)"
)


def verdict(report: Mapping[str, Any]) -> str:
    """How far an adapter has moved, in a sentence."""
    angles = [layer["angle"]["mean"] for layer in report["layers"] if layer["angle"]]
    if angles:
        low, high = min(angles), max(angles)
        if high <= SLIGHTLY:
            return f"Moved slightly: {low:.0f}° to {high:.0f}°; it may not show its subject yet."
        if high <= FAR:
            return f"Moved moderately: {low:.0f}° to {high:.0f}°; other prompts are safe at strength 1."
        return (
            f"Moved far: {low:.0f}° to {high:.0f}°; look at prompts without the subject, and try a strength below 1 "
            "where they suffer."
        )
    if report["layers"]:
        return (
            "Plain ETHER: every layer is reflected fully, whatever was learned; look at prompts without the subject "
            "to see what it cost."
        )
    return "Holds no reflections."


def by_block(layers: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str, float]]]:
    """A figure's name, and for each block and side its mean: degrees of ETHER+, distances of plain ETHER."""
    turned = [layer for layer in layers if layer["angle"]]
    title = "Degrees turned" if turned else "Distance from the identity"
    sums: dict[tuple[str, str], list[float]] = {}
    for layer in turned or layers:
        figure = layer["angle"]["mean"] if turned else layer["distance"]
        sums.setdefault((block_of(layer), layer["side"]), []).append(figure)
    return title, [(block, side, sum(each) / len(each)) for (block, side), each in sums.items()]


def block_of(layer: Mapping[str, Any]) -> str:
    """The block of a model that a layer lies in, such as `unet up 1` or `transformer 12`."""
    path = layer["path"].removeprefix(f"{layer['component']}.") if layer["component"] else layer["path"]
    found = BLOCK.match(path)
    stage = found["stage"] if found else path.partition(".")[0]
    for long, short in (("down_blocks.", "down "), ("up_blocks.", "up "), ("mid_block", "middle")):
        stage = stage.replace(long, short)
    return (
        f"{layer['component'] or ''} {stage.replace('transformer_blocks.', '').replace('single_', 'single ')}".strip()
    )
