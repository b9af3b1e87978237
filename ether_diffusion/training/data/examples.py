"""Training examples by number: listed and read at once, stored as rows of a data set, or streamed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.training.data.views import Size
from ether_diffusion.training.options.base import is_unicode
from ether_diffusion.training.seeds import derive

SHUFFLE_BUFFER = 1000
FINGERPRINTED_ROWS = 256

Row = dict[str, Any]
Cell = dict[str, Any] | None
"""An image as `datasets` stores it: {"bytes": …, "path": …}."""


@dataclass(frozen=True)
class Example:
    """An image with its captions and perhaps a control image.

    name: what to call it in a message.
    captions: one of them is drawn for each sample.
    read: gives the image as upright RGB; raises `InputError` where it is damaged.
    read_control: gives its control image likewise; None where there is none.
    """

    name: str
    captions: tuple[str, ...]
    read: Callable[[], Image.Image]
    read_control: Callable[[], Image.Image] | None = None


class Examples(Sequence[Example]):
    """Examples by number.

    fingerprint: equal for equal data, wherever it lies.
    sizes: of the images, where they are known before the samples come.
    endless: whether it is a stream, without a length or an order.
    """

    fingerprint: str
    sizes: Sequence[Size] | None = None
    endless: bool = False

    def describe(self) -> str:
        """How many there are, in words."""
        return f"{len(self):,} pairs"


class ListedExamples(Examples):
    """A few examples, such as photographs of a subject, all read here, before any training.

    Raises:
        InputError: a file that is no image, or a damaged one.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)
        self.sizes: list[Size] = []
        digest = hashlib.sha256()
        for example in self.examples:
            image, prompt = example.read(), example.captions[0]
            if not is_unicode(prompt):
                raise InputError(f"{example.name}: its caption {prompt!r} is no valid Unicode")
            self.sizes.append(image.size)
            digest.update(hashlib.sha256(f"{image.size} {prompt}".encode() + image.tobytes()).digest())
        self.fingerprint = _named(digest)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.examples[number]

    def describe(self) -> str:
        return f"{len(self):,} images"


class StoredExamples(Examples):
    """The rows of a data set that lies on the disk, read when their samples come.

    Args:
        rows: of the data set.
        make: (row, its number) -> example.
        caption_column: of the rows.
        cells: row -> its images as they are stored.
    """

    def __init__(
        self, rows: Any, make: Callable[[Row, int], Example], caption_column: str, cells: Callable[[Row], list[Cell]]
    ):
        self.rows, self.make = rows, make
        # A part of the rows, evenly spread: data sets can be larger than what can be read before every training.
        digest = hashlib.sha256(str(len(rows)).encode())
        for number in np.linspace(0, len(rows) - 1, min(len(rows), FINGERPRINTED_ROWS)).round().astype(int).tolist():
            row = rows[number]
            digest.update(str(row[caption_column]).encode())
            for cell in cells(row):
                digest.update(hashlib.sha256(_content(cell)).digest())
        self.fingerprint = _named(digest)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Example:
        return self.make(self.rows[number], number)


class StreamedExamples(Examples):
    """The rows of a stream, read once and forgotten. Numbers rise; one that was passed makes the stream start anew.

    When the stream ends, it begins again in another order.

    Args:
        rows: an iterable data set.
        make: (row, its number) -> example.
        name: of the data set.
        seed: of the order.
    """

    endless = True

    def __init__(self, rows: Any, make: Callable[[Row, int], Example], name: str, seed: int):
        self.rows, self.make, self.seed = rows, make, seed
        self.fingerprint = f"stream of {name}"
        self._next, self._stream = 0, self._endless()

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __getitem__(self, number: int) -> Example:
        if number < self._next:
            self._next, self._stream = 0, self._endless()
        skipped, self._next = number - self._next, number + 1
        return self.make(next(islice(self._stream, skipped, None)), number)

    def describe(self) -> str:
        return "a stream of pairs"

    def _endless(self) -> Iterator[Row]:
        epoch, empty = 0, True
        while True:
            for row in self.rows.shuffle(seed=derive(self.seed, "stream", epoch) % 2**32, buffer_size=SHUFFLE_BUFFER):
                empty = False
                yield row
            if empty:
                raise InputError(f"{self.fingerprint}: has no rows")
            epoch += 1


def _named(digest: Any) -> str:
    """A fingerprint as training checkpoints hold it."""
    return f"sha256:{digest.hexdigest()[:16]}"


def _content(cell: Cell) -> bytes:
    """The file of an image; nothing where it cannot be read, which is told when its sample comes."""
    if not cell or cell.get("bytes") is not None or not cell.get("path"):
        return (cell or {}).get("bytes") or b""
    with contextlib.suppress(OSError, ValueError):  # a zero byte is in no path
        return Path(cell["path"]).read_bytes()
    return b""
