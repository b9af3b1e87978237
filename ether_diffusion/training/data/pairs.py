"""Pairs of an image and a control image, from a folder or a data set, and the views that samples show of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import INTERPOLATIONS, to_pixels
from ether_diffusion.training.data.examples import open_data_set, read_cell
from ether_diffusion.training.data.views import (
    Framing,
    Size,
    Target,
    View,
    cut,
    frame,
    nearest_target,
    place_view,
    shrink,
)
from ether_diffusion.training.options import ControlDataOptions
from ether_diffusion.training.seeds import derive, generator

SHUFFLE_BUFFER = 1000
FINGERPRINTED_ROWS = 256

_KEPT_PAIRS = 64


@dataclass(frozen=True)
class Pair:
    """An image, its control image and its captions.

    name: what to call it in a message. read_image, read_control: give upright RGB, or raise `InputError`.
    """

    name: str
    captions: tuple[str, ...]
    read_image: Callable[[], Image.Image]
    read_control: Callable[[], Image.Image]


class Pairs(Protocol):
    """Pairs by number. `fingerprint`: equal for equal data. `endless`: a stream, without a length or an order."""

    fingerprint: str
    endless: bool

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Pair: ...


# Where pairs come from ------------------------------------------------------------------------------------------


def find_pairs(options: ControlDataOptions, *, seed: int) -> Pairs:
    """The pairs that the options name.

    seed: of the order of a stream.

    Raises:
        InputError: no data there, or a column that is missing (names those that exist), or `datasets` is missing.
    """
    source = options.dataset_name or str(options.train_data_dir)
    if options.train_data_dir is not None and not Path(source).is_dir():
        raise InputError(f"--train_data_dir {source}: there is no such folder")
    rows = open_data_set(
        source,
        options.dataset_config_name,
        flag="--dataset_name" if options.dataset_name is not None else "--train_data_dir",
        columns={
            "image_column": options.image_column,
            "conditioning_image_column": options.conditioning_image_column,
            "caption_column": options.caption_column,
        },
        pictures=("image_column", "conditioning_image_column"),
        streaming=options.streaming,
    )
    folder = Path(source) if Path(source).is_dir() else None
    if options.max_train_samples is not None:
        rows = rows.take(options.max_train_samples)
    make = partial(_make_pair, options, source, folder)
    return StreamedPairs(rows, make, source, seed) if options.streaming else StoredPairs(rows, make, options, folder)


def _make_pair(
    options: ControlDataOptions, source: str, folder: Path | None, row: dict[str, Any], number: int
) -> Pair:
    name = f"{source}, row {number}"
    captions = row[options.caption_column]
    captions = list(captions) if isinstance(captions, (list, tuple)) else [captions]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        kind = type(captions[0]).__name__
        raise InputError(f"{name}: its {options.caption_column} is a {kind}, needs a text or a list of texts")

    def read(column: str) -> Image.Image:
        return read_cell(_located(row[column], folder), f"{name}, {column}")

    return Pair(
        name,
        tuple((caption or "").strip() for caption in captions) or ("",),
        partial(read, options.image_column),
        partial(read, options.conditioning_image_column),
    )


def _located(cell: dict[str, Any] | None, folder: Path | None) -> dict[str, Any] | None:
    """An image as it is stored, or as a file whose path counts from the folder of the data."""
    if folder is None or not cell or cell.get("bytes") is not None or not cell.get("path"):
        return cell
    return {"path": str(folder / cell["path"])}  # an absolute path stays as it is


def _content(cell: dict[str, Any] | None) -> bytes:
    """The file of an image; nothing where it cannot be read, which is told when its sample comes."""
    if not cell or cell.get("bytes") is not None or not cell.get("path"):
        return (cell or {}).get("bytes") or b""
    with contextlib.suppress(OSError):
        return Path(cell["path"]).read_bytes()
    return b""


class StoredPairs:
    """The rows of a data set that lies on the disk. A part of them, evenly spread, makes the fingerprint."""

    endless = False

    def __init__(
        self,
        rows: Any,
        make: Callable[[dict[str, Any], int], Pair],
        options: ControlDataOptions,
        folder: Path | None,
    ):
        self.rows, self.make = rows, make
        digest = hashlib.sha256(str(len(rows)).encode())
        for number in np.linspace(0, len(rows) - 1, min(len(rows), FINGERPRINTED_ROWS)).round().astype(int).tolist():
            row = rows[number]
            digest.update(str(row[options.caption_column]).encode())
            for column in (options.image_column, options.conditioning_image_column):
                digest.update(hashlib.sha256(_content(_located(row[column], folder))).digest())
        self.fingerprint = f"sha256:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Pair:
        return self.make(self.rows[number], number)


class StreamedPairs:
    """The rows of a stream, read once and forgotten. Numbers rise; a smaller one makes the stream start anew.

    When the stream ends, it begins again in another order.
    """

    endless = True

    def __init__(self, rows: Any, make: Callable[[dict[str, Any], int], Pair], name: str, seed: int):
        self.rows, self.make, self.seed = rows, make, seed
        self.fingerprint = f"stream of {name}"
        self._kept: dict[int, dict[str, Any]] = {}
        self._start()

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __getitem__(self, number: int) -> Pair:
        if number not in self._kept and number < self._next:
            self._start()
        while self._next <= number:
            self._kept[self._next] = next(self._stream)
            self._next += 1
            while len(self._kept) > _KEPT_PAIRS:
                del self._kept[next(iter(self._kept))]
        return self.make(self._kept[number], number)

    def _start(self) -> None:
        self._stream, self._next = self._endless(), 0
        self._kept.clear()

    def _endless(self) -> Iterator[dict[str, Any]]:
        epoch, empty = 0, True
        while True:
            for row in self.rows.shuffle(seed=derive(self.seed, "stream", epoch) % 2**32, buffer_size=SHUFFLE_BUFFER):
                empty = False
                yield row
            if empty:
                raise InputError(f"{self.fingerprint}: has no rows")
            epoch += 1


# Views of them --------------------------------------------------------------------------------------------------


class ControlImages:
    """Training views of pairs, addressed by the global index of the sample: both images get the same crop and flip.

    As `TrainingImages`, but images are read when their sample comes. Of a stream, sample s is row s; else an epoch
    visits every pair once in an order of its own.

    Args:
        pairs: the data.
        targets: (height, width) in pixels that a view can have.
        center_crop, random_flip, fixed_crops, seed: as for `TrainingImages`.
        group_size: taken for its likeness to `TrainingImages`; sizes are not known ahead, so nothing is grouped.
        interpolation: of control images, "nearest" or "lanczos".
        proportion_empty_prompts: part of the samples without a prompt.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        targets: Sequence[Target],
        center_crop: bool = False,
        random_flip: bool = False,
        fixed_crops: bool = False,
        group_size: int = 1,
        interpolation: str = "nearest",
        proportion_empty_prompts: float = 0.0,
        seed: int = 0,
    ):
        self.pairs, self.possible_targets = pairs, list(targets)
        self.center_crop, self.random_flip, self.fixed_crops = center_crop, random_flip, fixed_crops
        self.resample = INTERPOLATIONS[interpolation]
        self.proportion_empty_prompts = proportion_empty_prompts
        self.seed = seed
        self._pair = lru_cache(maxsize=_KEPT_PAIRS)(self._read)
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self.fingerprint = pairs.fingerprint

    def __len__(self) -> int:
        """Samples in an epoch; of a stream, which has none, 1."""
        return 1 if self.pairs.endless else len(self.pairs)

    def describe(self) -> str:
        """How many pairs, in words."""
        return "a stream of pairs" if self.pairs.endless else f"{len(self.pairs):,} pairs"

    @property
    def prompts(self) -> list[str]:
        """Every prompt that can come."""
        captions = {caption for number in range(len(self.pairs)) for caption in self.pairs[number].captions}
        return sorted(captions | ({""} if self.proportion_empty_prompts else set()))

    def view(self, sample: int) -> View:
        """Which part of which pair sample number `sample` shows."""
        number = sample
        if not self.pairs.endless:
            epoch, place = divmod(sample, len(self.pairs))
            number = self._order(epoch)[place]
        flip = self.random_flip and bool(torch.rand((), generator=generator(self.seed, "flip", sample)) < 0.5)
        crop = generator(self.seed, *(("fixed crop", number) if self.fixed_crops else ("crop", sample)))
        return self._crop(number, crop, flip)

    def all_views(self) -> Iterator[View]:
        """Every view that can come, where crops are fixed or central."""
        for number in range(len(self.pairs)):
            for flip in (False, True)[: 1 + self.random_flip]:
                yield self._crop(number, generator(self.seed, "fixed crop", number), flip)

    def prompt(self, view: View, sample: int) -> str:
        """The caption of the pair, one drawn where it has several, or none by chance."""
        draw = generator(self.seed, "caption", sample)
        if float(torch.rand((), generator=draw)) < self.proportion_empty_prompts:
            return ""
        captions = self._pair(view.image).captions
        return captions[int(torch.randint(len(captions), (), generator=draw))]

    def pixels(self, view: View) -> torch.Tensor:
        """The image's view as (3, height, width), float32, from -1 (black) to 1 (white)."""
        pair = self._pair(view.image)
        return to_pixels(cut(pair.image, view, pair.target))

    def control(self, view: View) -> torch.Tensor:
        """The control image's view as (3, height, width), float32, from 0 (black) to 1 (white)."""
        pair = self._pair(view.image)
        return to_pixels(cut(pair.control, view, pair.target, self.resample)).add(1).div(2)

    def framing(self, view: View) -> Framing:
        """Size and crop of the view."""
        pair = self._pair(view.image)
        return frame(pair.original_size, view, pair.target)

    def _crop(self, number: int, draw: torch.Generator, flip: bool) -> View:
        pair = self._pair(number)
        place = None if self.center_crop else draw
        return place_view(number, pair.original_size, pair.target, place, flip=flip)

    def _read(self, number: int) -> _ReadPair:
        pair = self.pairs[number]
        image, control = pair.read_image(), pair.read_control()
        # One pixel of difference in the longer side comes from rounding alone.
        if abs(image.width * control.height - image.height * control.width) > max(image.size) + max(control.size):
            raise InputError(
                f"{pair.name}: the control image has {control.width}x{control.height} pixels and the image "
                f"{image.width}x{image.height}; the two need one shape"
            )
        target = self.possible_targets[nearest_target(image.size, self.possible_targets)]
        shrunk = shrink(image, target)
        if control.size != shrunk.size:
            control = control.resize(shrunk.size, self.resample)
        return _ReadPair(shrunk, control, image.size, target, pair.captions)

    def _shuffle(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.pairs), generator=generator(self.seed, "order", epoch)).tolist()


@dataclass(frozen=True)
class _ReadPair:
    """A pair in memory, reduced for training; both images have one size."""

    image: Image.Image
    control: Image.Image
    original_size: Size
    target: Target
    captions: tuple[str, ...]
