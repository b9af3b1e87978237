"""What the commands print: lines and tables, safe for a terminal and plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ether_diffusion.errors import printable

UNKNOWN = "–"
LONGEST_TEXT = 200
UNLIMITED = 10**6
"""Columns of a pipe or a file: rich would break lines at 80, which no program that reads them expects."""


def show(*parts: str | Table) -> None:
    """Print lines and tables, as they are: brackets in a file's texts are no markup."""
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else UNLIMITED)
    for part in parts:
        console.print(part)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 2) -> Table:
    """Columns under their heads: the first `texts` to the left, the numbers after them to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for k, name in enumerate(head):
        made.add_column(name, justify="left" if k < texts else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def shorten(text: str) -> str:
    """Text from a file: control characters come escaped, and what is long is cut."""
    text = printable(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 2]} …"


def name_layer(row: dict[str, str | None]) -> str:
    """The layer of a report's row: its component, where that is known, and its path."""
    return shorten(f"{row['component']}.{row['path']}" if row["component"] else row["path"])
