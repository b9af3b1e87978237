"""Where training examples come from: folders of images with captions, and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ether_diffusion.errors import InputError
from ether_diffusion.images import ValueRange, find_images, some
from ether_diffusion.training.data import examples
from ether_diffusion.training.data.captions import captions_in
from ether_diffusion.training.data.data_sets import content_of, open_data_set
from ether_diffusion.training.data.examples import Example, Examples, ImageSource, ListedExamples, Row
from ether_diffusion.training.options import ControlDataOptions, InstanceDataOptions


def find_examples(options: InstanceDataOptions) -> ListedExamples:
    """The instance images that the options name, each under its own caption or the instance prompt.

    Raises:
        InputError: no images there, damaged ones, captions that cannot be read, or `datasets` is missing.
    """
    if options.dataset_name is not None:
        return _examples_of_data_set(options)
    folder, flag = Path(str(options.instance_data_dir)), "--instance_data_dir"
    paths = find_images(folder, flag)
    captions = captions_in(folder, paths, options.caption_column, flag)
    return examples_of(paths, options.instance_prompt, captions, _references(options.reference_dir, paths))


def examples_of(
    paths: Sequence[Path],
    prompt: str,
    captions: Mapping[str, str] | None = None,
    references: Mapping[Path, Path] | None = None,
) -> ListedExamples:
    """Image files as examples.

    Args:
        paths: the files.
        prompt: of every image that has no caption.
        captions: file name -> caption.
        references: file -> that of its reference image.
    """
    references, captions = references or {}, captions or {}
    return ListedExamples([_example(path, prompt, captions.get(path.name), references.get(path)) for path in paths])


def _references(folder: str | None, paths: Sequence[Path]) -> dict[Path, Path]:
    """The reference image of each image: the file of its name, whatever its suffix.

    Raises:
        InputError: there is none, or there are several.
    """
    if folder is None:
        return {}
    flag, named = "--reference_dir", {}
    for path in find_images(folder, flag):
        if path.stem in named:
            raise InputError(f"{flag} {folder}: {named[path.stem].name} and {path.name} have one name; remove one")
        named[path.stem] = path
    if missing := [path.name for path in paths if path.stem not in named]:
        raise InputError(f"{flag} {folder}: has no image of the name of {some(missing)}")
    return {path: named[path.stem] for path in paths}


def find_pairs(options: ControlDataOptions, *, seed: int, value_range: ValueRange | None = None) -> Examples:
    """The images with control images that the options name, all looked at but those of a stream.

    Args:
        seed: of the order of a stream.
        value_range: of control images, as `images.to_rgb` takes it.

    Raises:
        InputError: no data there, or a column that is missing (names those that exist), a pair that cannot be used,
            or `datasets` is missing.
    """
    source = options.dataset_name or str(options.train_data_dir)
    if options.train_data_dir is not None and not Path(source).is_dir():
        raise InputError(f"--train_data_dir {source}: there is no such folder")
    ranges = {options.image_column: None, options.conditioning_image_column: value_range}
    flag = "train_data_dir" if options.dataset_name is None else "dataset_name"
    rows = open_data_set(
        options, flag, images=("image_column", "conditioning_image_column"), streaming=options.streaming
    )
    folder = _folder_of(source)
    if options.max_train_samples is not None:
        rows = rows.take(options.max_train_samples)

    def image(row: Row, name: str, column: str) -> ImageSource:
        content = content_of(row, column, folder)
        file = f" {row[column]['path']}" if isinstance(content, Path) else ""
        return ImageSource(f"{name}, {column}{file}", lambda: content, ranges[column])

    def pair(row: Row, number: int) -> Example:
        name = f"{source}, row {number}"
        texts = _texts(row[options.caption_column], name, options.caption_column)
        columns = (options.image_column, options.conditioning_image_column)
        images = [image(row, name, column) for column in columns]
        return Example(name, tuple(texts) or ("",), *images, captioned=any(texts))

    if options.streaming:
        return examples.StreamedExamples(rows, pair, source, seed)
    return examples.StoredExamples(rows, pair, options.caption_column)


def _example(path: Path, prompt: str, caption: str | None, reference: Path | None) -> Example:
    image = ImageSource(str(path), lambda: path)
    second = None if reference is None else ImageSource(str(reference), lambda: reference)
    captions = (caption or prompt,)
    return Example(str(path), captions, image, second, captioned=caption is not None, role="reference image")


def _examples_of_data_set(options: InstanceDataOptions) -> ListedExamples:
    rows = open_data_set(options, "dataset_name", images=("image_column",))
    folder = _folder_of(str(options.dataset_name))

    def content(number: int) -> Path | bytes | None:
        return content_of(rows[number], options.image_column, folder)

    captions: Sequence[Any] = rows[options.caption_column] if options.caption_column else [None] * len(rows)
    listed = []
    for number, caption in enumerate(captions):
        name = f"--dataset_name {options.dataset_name}, row {number}"
        texts = _texts(caption, name, str(options.caption_column))
        own = texts[0] if texts else ""
        image = ImageSource(name, partial(content, number))
        listed.append(Example(name, (own or options.instance_prompt,), image, captioned=bool(own)))
    return ListedExamples(listed)


def _folder_of(source: str) -> Path | None:
    return Path(source) if Path(source).is_dir() else None


def _texts(cell: Any, name: str, column: str) -> list[str]:
    """The captions in a cell: a text or a list of texts, where nothing is a blank one."""
    captions = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        kind = type(captions[0]).__name__
        raise InputError(f"{name}: its {column} is a {kind}, needs a text or a list of texts")
    return [(caption or "").strip() for caption in captions]
