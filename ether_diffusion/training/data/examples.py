"""Training examples by number: listed and read at once, stored as rows of a data set, or streamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import ValueRange, check_image, read_image
from ether_diffusion.training.data.checking import check_all
from ether_diffusion.training.data.views import Size
from ether_diffusion.training.seeds import derive

SHUFFLE_BUFFER = 1000
FINGERPRINTED_ROWS = 256

Row = dict[str, Any]


@dataclass(frozen=True)
class ImageSource:
    """An image that is read when it is needed.

    name: what to call it in a message.
    content: gives its file, as a path or as bytes; None where there is none.
    value_range: as `images.to_rgb` takes it.
    """

    name: str
    content: Callable[[], str | Path | bytes | None]
    value_range: ValueRange | None = None

    def read(self) -> Image.Image:
        """The image as upright RGB. Raises `InputError` where it is not there or damaged."""
        return read_image(self._file(), self.name, self.value_range)

    def check(self) -> Size:
        """The size that `read` will give; raises as that does, where the file shows it without being decoded."""
        return check_image(self._file(), self.name, self.value_range)

    def _file(self) -> str | Path | BinaryIO:
        content = self.content()
        if content is None:
            raise InputError(f"{self.name}: has no image")
        return io.BytesIO(content) if isinstance(content, bytes) else content


@dataclass(frozen=True)
class Example:
    """An image with its captions and perhaps one that goes with it: a control image, or a reference image.

    name: what to call it in a message.
    captions: one of them is drawn for each sample.
    captioned: whether they are its own, and not a prompt that stands in for one.
    role: what the second image is.
    """

    name: str
    captions: tuple[str, ...]
    image: ImageSource
    control: ImageSource | None = None
    captioned: bool = True
    role: str = "control image"

    def read(self) -> Image.Image:
        """The image as upright RGB. Raises `InputError` where it is damaged."""
        return self.image.read()

    def check_captions(self) -> None:
        """Make sure that captions can be written down: JSON may escape halves of characters."""
        for caption in self.captions:
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{self.name}: its caption {caption!r} is no valid Unicode") from error

    def check(self) -> Size:
        """The size of the image. Raises `InputError` for what captions and files show to be wrong."""
        self.check_captions()
        size = self.image.check()
        if self.control is not None:
            self.check_shape(size, self.control.check())
        return size

    def check_shape(self, image: Size, control: Size) -> None:
        """Make sure that the image and the one that goes with it have one shape."""
        # One pixel of difference in the longer side comes from rounding alone.
        if abs(image[0] * control[1] - image[1] * control[0]) > max(image) + max(control):
            raise InputError(
                f"{self.name}: the {self.role} has {control[0]}x{control[1]} pixels and the image "
                f"{image[0]}x{image[1]}; the two need one shape"
            )


class Examples(Sequence[Example]):
    """Examples by number.

    fingerprint: equal for equal data, wherever it lies.
    captioned: how many have captions of their own; of a stream it is not known.
    noun: what to call them.
    sizes: of the images, where they are known before the samples come.
    endless: whether it is a stream, without a length or an order.
    """

    fingerprint: str
    captioned: int = 0
    noun: str = "images"
    sizes: Sequence[Size] | None = None
    endless: bool = False

    def describe(self) -> str:
        """How many there are, in words."""
        return f"{len(self):,} {self.noun}, {f'{self.captioned:,}' if self.captioned else 'none'} with captions"


class ListedExamples(Examples):
    """A few examples, such as photographs of a subject, all read here, before any training.

    Raises:
        InputError: a file that is no image, or a damaged one.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)
        looks = check_all(self._look, lambda number: self.examples[number].name, len(self.examples))
        self.sizes = [size for size, _ in looks]
        self.captioned = sum(example.captioned for example in self.examples)
        digest = hashlib.sha256()
        for _, part in looks:
            digest.update(part)
        self.fingerprint = _named(digest)

    def _look(self, number: int) -> tuple[Size, bytes]:
        """Size of an image, and a digest of it and its prompt."""
        example = self.examples[number]
        example.check_captions()
        image = example.read()
        digest = hashlib.sha256(f"{image.size} {example.captions[0]}".encode() + image.tobytes())
        if example.control is not None:
            second = example.control.read()
            example.check_shape(image.size, second.size)
            digest.update(f"{second.size}".encode() + second.tobytes())
        return image.size, digest.digest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        return self.examples[number]


class StoredExamples(Examples):
    """The rows of a data set that lies on the disk, looked at here and read when their samples come.

    Args:
        rows: of the data set.
        make: (row, its number) -> example.
        caption_column: of the rows.

    Raises:
        InputError: a row that cannot be used, as far as its files show that without being decoded.
    """

    noun = "pairs"

    def __init__(self, rows: Any, make: Callable[[Row, int], Example], caption_column: str):
        self.rows, self.make = rows, make
        looks = check_all(self._look, lambda number: f"row {number}", len(rows))
        self.sizes, self.captioned = [size for size, _ in looks], sum(captioned for _, captioned in looks)
        # A part of the rows, evenly spread: data sets can be larger than what can be read before every training.
        digest = hashlib.sha256(str(len(rows)).encode())
        for number in np.linspace(0, len(rows) - 1, min(len(rows), FINGERPRINTED_ROWS)).round().astype(int).tolist():
            row = rows[number]
            example = make(row, number)
            digest.update(str(row[caption_column]).encode())
            for image in filter(None, (example.image, example.control)):
                digest.update(hashlib.sha256(_bytes_of(image)).digest())
        self.fingerprint = _named(digest)

    def _look(self, number: int) -> tuple[Size, bool]:
        """Size of an image, and whether it has a caption."""
        example = self[number]
        return example.check(), example.captioned

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Example:
        with _telling(f"row {number}"):
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
        with _telling(self.fingerprint):
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


def _bytes_of(image: ImageSource) -> bytes:
    """The file of an image that was looked at; nothing where it is gone meanwhile, which is told when it is read."""
    content = image.content()
    if isinstance(content, bytes):
        return content
    with contextlib.suppress(OSError, ValueError):  # a zero byte is in no path
        return Path(content or "").read_bytes()
    return b""


@contextlib.contextmanager
def _telling(where: str) -> Iterator[None]:
    """A context in which whatever a data set raises becomes one sentence."""
    try:
        yield
    except (InputError, IndexError):  # the latter ends a loop over a sequence
        raise
    except Exception as error:  # of its builders, the file system or the network
        raise InputError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error
