"""What is trained on: images with their prompts, from a folder or a data set, and the views that samples show."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images, read_image, to_pixels
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
from ether_diffusion.training.options import InstanceDataOptions
from ether_diffusion.training.seeds import generator

METADATA_NAME, METADATA_FILE_KEY, METADATA_CAPTION_KEY = "metadata.jsonl", "file_name", "text"

_KEPT_IMAGES = 64


@dataclass(frozen=True)
class Example:
    """An image with its prompt.

    name: what to call it in a message.
    prompt: the text that it is trained under.
    read: gives the image as upright RGB; raises `InputError` where it is damaged.
    """

    name: str
    prompt: str
    read: Callable[[], Image.Image]


# Where examples come from ---------------------------------------------------------------------------------------


def find_examples(options: InstanceDataOptions) -> list[Example]:
    """The instance images that the options name, each under its own caption or the instance prompt.

    Raises:
        InputError: no images there, captions that cannot be read, or `datasets` is missing.
    """
    if options.dataset_name is not None:
        return _from_data_set(options)
    folder = Path(str(options.instance_data_dir))
    paths = find_images(folder)
    captions = _captions_beside(paths) | _captions_in_metadata(folder, options.caption_column)
    return examples_of(paths, options.instance_prompt, captions)


def examples_of(paths: Sequence[Path], prompt: str, captions: dict[str, str] | None = None) -> list[Example]:
    """Image files as examples.

    Args:
        paths: the files.
        prompt: of every image that has no caption.
        captions: file name -> caption.
    """
    captions = {} if captions is None else captions
    return [Example(str(path), captions.get(path.name, prompt), partial(read_image, path)) for path in paths]


def _captions_beside(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> text of the .txt file of the same name, where there is one that is not blank."""
    captions = {}
    for path in paths:
        file = path.with_suffix(".txt")
        if file.is_file():
            try:
                text = file.read_text("utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{file}: the caption cannot be read as UTF-8 text ({error})") from error
            if text:
                captions[path.name] = " ".join(text.split())
    return captions


def _captions_in_metadata(folder: Path, column: str | None) -> dict[str, str]:
    """File name -> caption in `metadata.jsonl`: one JSON object a line, with the keys file_name and text."""
    file = folder / METADATA_NAME
    if not file.is_file():
        if column is not None:
            raise InputError(f"--caption_column {column}: there is no {METADATA_NAME} in {folder}")
        return {}
    key = METADATA_CAPTION_KEY if column is None else column
    captions: dict[str, str] = {}
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(METADATA_FILE_KEY), str):
            raise InputError(f"{where}: needs an object with a text under {METADATA_FILE_KEY!r}")
        name = row[METADATA_FILE_KEY]
        if not (folder / name).is_file() or Path(name).name != name:
            raise InputError(f"{where}: there is no file {name!r} directly in {folder}")
        if not isinstance(row.get(key), str):
            raise InputError(f"{where}: needs a text under {key!r}; its keys are {', '.join(row)}")
        if row[key].strip():
            captions[name] = row[key].strip()
    return captions


def _from_data_set(options: InstanceDataOptions) -> list[Example]:
    columns = {"image_column": options.image_column}
    if options.caption_column is not None:
        columns["caption_column"] = options.caption_column
    rows = open_data_set(
        str(options.dataset_name), options.dataset_config_name, columns=columns, pictures=("image_column",)
    )

    def read(number: int, name: str) -> Image.Image:
        return read_cell(rows[number][options.image_column], name)

    captions: Sequence[Any] = rows[options.caption_column] if options.caption_column else [None] * len(rows)
    examples = []
    for number, caption in enumerate(captions):
        name = f"--dataset_name {options.dataset_name}, row {number}"
        if isinstance(caption, (list, tuple)):
            caption = next(iter(caption), None)
        if caption is not None and not isinstance(caption, str):
            raise InputError(f"{name}: its {options.caption_column} is a {type(caption).__name__}, needs a text")
        prompt = caption.strip() if caption and caption.strip() else options.instance_prompt
        examples.append(Example(name, prompt, partial(read, number, name)))
    return examples


def open_data_set(
    name: str,
    config_name: str | None,
    *,
    columns: Mapping[str, str],
    pictures: Sequence[str],
    flag: str = "--dataset_name",
    streaming: bool = False,
) -> Any:
    """The split train of a data set on the Hub or in a folder, its images as they are stored.

    Args:
        name: as `datasets.load_dataset` takes it.
        config_name: of its configurations.
        columns: option that names a column -> the column.
        images: those of the options whose columns hold images.
        flag: what the user gave the name with, for the messages.
        streaming: an iterable that reads the rows as they come.

    Raises:
        InputError: `datasets` is missing, there is no such data set, or it lacks a column; names those that it has.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'{flag}: the package datasets is missing; pip install "ether-diffusion[datasets]"')
    import datasets

    given = f"{flag} {name}"
    try:
        rows = datasets.load_dataset(name, config_name, split="train", streaming=streaming)
    except Exception as error:  # whatever its builders, the file system or the Hub raise
        raise InputError(f"{given}: cannot be loaded ({type(error).__name__}: {error})") from error
    if rows.column_names is None:  # a stream of files without a schema
        rows = rows._resolve_features()
    for option, column in columns.items():
        if column not in rows.column_names:
            raise InputError(f"--{option} {column}: {given} has the columns {', '.join(rows.column_names)}")
    if not streaming and not len(rows):
        raise InputError(f"{given}: has no rows")
    for option in pictures:
        try:
            # Read by our own reader, which is strict and upright, instead of the data set's.
            rows = rows.cast_column(columns[option], datasets.Image(decode=False))
        except Exception as error:  # pyarrow's and datasets' own, of many classes
            kind = rows.features[columns[option]]
            raise InputError(f"--{option} {columns[option]}: holds {kind}, no images") from error
    return rows


def read_cell(cell: dict[str, Any] | None, name: str) -> Image.Image:
    """An image as `datasets` stores it: its bytes, or the path of its file."""
    if not cell or (cell.get("bytes") is None and not cell.get("path")):
        raise InputError(f"{name}: has no image")
    if cell.get("bytes") is not None:
        return read_image(io.BytesIO(cell["bytes"]), name)
    return read_image(cell["path"], name)


# Views of them --------------------------------------------------------------------------------------------------


class TrainingImages:
    """Training views of a few images, addressed by the global index of the sample.

    An epoch visits every image `repeats` times, in an order of its own; sample s belongs to epoch s // len(images).
    The order, the place of the crop and the mirroring follow from (seed, s) alone.

    Args:
        examples: the images and their prompts.
        targets: (height, width) in pixels that a view can have; every image has the one whose aspect ratio is
            nearest to its own.
        center_crop: cut at the centre instead of at a random place.
        random_flip: mirror with probability one half.
        repeats: how often each image comes in an epoch.
        fixed_crops: one crop for each repeat of an image, the same in every epoch, so that there are few views.
        group_size: samples of one forward pass over all processes; where targets differ, the order keeps so many
            samples of one target together.
        seed: of the run.

    Attributes:
        prompts: of each image.
        fingerprint: SHA-256 over the pixels and prompts of all: equal for equal data, wherever it lies.

    Raises:
        InputError: a file that is no image, or a damaged one: all are read here, before any training.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        targets: Sequence[Target],
        center_crop: bool = False,
        random_flip: bool = False,
        repeats: int = 1,
        fixed_crops: bool = False,
        group_size: int = 1,
        seed: int = 0,
    ):
        self.examples = list(examples)
        self.prompts = [example.prompt for example in self.examples]
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.repeats = repeats
        self.fixed_crops = fixed_crops
        self.group_size = group_size
        self.seed = seed
        self._image = lru_cache(maxsize=_KEPT_IMAGES)(self._read)
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self.original_sizes: list[Size] = []
        self.targets: list[Target] = []
        digest = hashlib.sha256()
        for example in self.examples:
            image = example.read()
            self.original_sizes.append(image.size)
            self.targets.append(targets[nearest_target(image.size, targets)])
            digest.update(hashlib.sha256(f"{image.size} {example.prompt}".encode() + image.tobytes()).digest())
        self.fingerprint = f"sha256:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.examples) * self.repeats

    def view(self, sample: int) -> View:
        """Which part of which image sample number `sample` shows."""
        epoch, place = divmod(sample, len(self))
        number = self._order(epoch)[place]
        flip = self.random_flip and bool(torch.rand((), generator=generator(self.seed, "flip", sample)) < 0.5)
        crop = generator(self.seed, *(("fixed crop", number) if self.fixed_crops else ("crop", sample)))
        return self._crop(number % len(self.examples), crop, flip)

    def all_views(self) -> Iterator[View]:
        """Every view that can come, where crops are fixed or central."""
        for number in range(len(self)):
            for flip in (False, True)[: 1 + self.random_flip]:
                yield self._crop(number % len(self.examples), generator(self.seed, "fixed crop", number), flip)

    def prompt(self, view: View, sample: int) -> str:
        """What the view is trained under, when it comes as this sample."""
        return self.prompts[view.image]

    def control(self, view: View) -> torch.Tensor | None:
        """The control image of the view, (3, height, width) from 0 to 1; instance images have none."""
        return None

    def pixels(self, view: View) -> torch.Tensor:
        """The view as (3, height, width) of its target, float32, from -1 (black) to 1 (white)."""
        return to_pixels(cut(self._image(view.image), view, self.targets[view.image]))

    def framing(self, view: View) -> Framing:
        """Size and crop of the view."""
        return frame(self.original_sizes[view.image], view, self.targets[view.image])

    def _crop(self, image: int, draw: torch.Generator, flip: bool) -> View:
        place = None if self.center_crop else draw
        return place_view(image, self.original_sizes[image], self.targets[image], place, flip=flip)

    def _read(self, number: int) -> Image.Image:
        """An image, reduced for training."""
        return shrink(self.examples[number].read(), self.targets[number])

    def _shuffle(self, epoch: int) -> list[int]:
        """Number of the image, plus the count of images times number of the repeat, at each place of an epoch."""
        draw = generator(self.seed, "order", epoch)
        order = torch.randperm(len(self), generator=draw).tolist()
        if len(set(self.targets)) == 1:
            return order
        by_target: dict[Target, list[int]] = {}
        for number in order:
            by_target.setdefault(self.targets[number % len(self.examples)], []).append(number)
        whole, rest = [], []
        for numbers in by_target.values():
            groups = [numbers[k : k + self.group_size] for k in range(0, len(numbers), self.group_size)]
            (whole if len(groups[-1]) == self.group_size else rest).append(groups.pop())
            whole += groups
        shuffled = [whole[k] for k in torch.randperm(len(whole), generator=draw)]
        return [number for group in [*shuffled, *rest] for number in group]
