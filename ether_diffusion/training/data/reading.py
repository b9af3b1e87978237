"""Where training examples come from: folders of images with captions, and data sets of `datasets`."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images, read_image
from ether_diffusion.training.data import examples
from ether_diffusion.training.data.examples import Cell, Example, Examples, ListedExamples, Row
from ether_diffusion.training.options import ControlDataOptions, InstanceDataOptions

METADATA_NAME, METADATA_FILE_KEY, METADATA_CAPTION_KEY = "metadata.jsonl", "file_name", "text"


def find_examples(options: InstanceDataOptions) -> ListedExamples:
    """The instance images that the options name, each under its own caption or the instance prompt.

    Raises:
        InputError: no images there, damaged ones, captions that cannot be read, or `datasets` is missing.
    """
    if options.dataset_name is not None:
        return _examples_of_data_set(options)
    folder = Path(str(options.instance_data_dir))
    paths = find_images(folder)
    captions = _captions_beside(paths) | _captions_in_metadata(folder, options.caption_column)
    return examples_of(paths, options.instance_prompt, captions)


def examples_of(paths: Sequence[Path], prompt: str, captions: Mapping[str, str] | None = None) -> ListedExamples:
    """Image files as examples.

    Args:
        paths: the files.
        prompt: of every image that has no caption.
        captions: file name -> caption.
    """
    prompts = {path: (captions or {}).get(path.name, prompt) for path in paths}
    return ListedExamples([Example(str(path), (text,), partial(read_image, path)) for path, text in prompts.items()])


def find_pairs(options: ControlDataOptions, *, seed: int) -> Examples:
    """The images with control images that the options name.

    seed: of the order of a stream.

    Raises:
        InputError: no data there, or a column that is missing (names those that exist), or `datasets` is missing.
    """
    source = options.dataset_name or str(options.train_data_dir)
    if options.train_data_dir is not None and not Path(source).is_dir():
        raise InputError(f"--train_data_dir {source}: there is no such folder")
    columns = (options.image_column, options.conditioning_image_column)
    flag = "train_data_dir" if options.dataset_name is None else "dataset_name"
    rows = _open_data_set(
        options, flag, images=("image_column", "conditioning_image_column"), streaming=options.streaming
    )
    folder = Path(source) if Path(source).is_dir() else None
    if options.max_train_samples is not None:
        rows = rows.take(options.max_train_samples)

    def cell(row: Row, column: str) -> Cell:
        """An image as it is stored, or as a file whose path counts from the folder of the data."""
        stored = row[column]
        if folder is None or not stored or stored.get("bytes") is not None or not stored.get("path"):
            return stored
        return {"path": str(folder / stored["path"])}  # an absolute path stays as it is

    def pair(row: Row, number: int) -> Example:
        name = f"{source}, row {number}"
        texts = _texts(row[options.caption_column], name, options.caption_column)
        readers = [partial(_read_cell, cell(row, column), f"{name}, {column}") for column in columns]
        return Example(name, tuple(texts) or ("",), *readers)

    if options.streaming:
        return examples.StreamedExamples(rows, pair, source, seed)
    return examples.StoredExamples(
        rows, pair, options.caption_column, lambda row: [cell(row, column) for column in columns]
    )


# Captions beside images -----------------------------------------------------------------------------------------


def _captions_beside(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> text of the .txt file of the same name, where there is one that is not blank."""
    captions = {}
    for path in paths:
        file = path.with_suffix(".txt")
        if file.is_file():
            if text := _read_text(file).strip():
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
    for number, line in enumerate(_read_text(file).split("\n"), 1):
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


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error


# Data sets ------------------------------------------------------------------------------------------------------


def _examples_of_data_set(options: InstanceDataOptions) -> ListedExamples:
    rows = _open_data_set(options, "dataset_name", images=("image_column",))

    def read(number: int, name: str) -> Image.Image:
        return _read_cell(rows[number][options.image_column], name)

    captions: Sequence[Any] = rows[options.caption_column] if options.caption_column else [None] * len(rows)
    listed = []
    for number, caption in enumerate(captions):
        name = f"--dataset_name {options.dataset_name}, row {number}"
        texts = _texts(caption, name, str(options.caption_column))
        prompt = (texts[0] if texts else "") or options.instance_prompt
        listed.append(Example(name, (prompt,), partial(read, number, name)))
    return ListedExamples(listed)


def _open_data_set(
    options: InstanceDataOptions | ControlDataOptions, flag: str, *, images: Sequence[str], streaming: bool = False
) -> Any:
    """The split train of the data set that a flag names, on the Hub or in a folder, its images as they are stored.

    images: those of the options whose columns hold images.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'--{flag}: the package datasets is missing; pip install "ether-diffusion[datasets]"')
    import datasets

    name = getattr(options, flag)
    given = f"--{flag} {name}"
    columns = {option: getattr(options, option) for option in (*images, "caption_column")}
    try:
        rows = datasets.load_dataset(name, options.dataset_config_name, split="train", streaming=streaming)
    except Exception as error:  # whatever its builders, the file system or the Hub raise
        raise InputError(f"{given}: cannot be loaded ({type(error).__name__}: {error})") from error
    if rows.column_names is None:  # a stream of files without a schema
        rows = rows._resolve_features()
    for option, column in columns.items():
        if column is not None and column not in rows.column_names:
            raise InputError(f"--{option} {column}: {given} has the columns {', '.join(rows.column_names)}")
    if not streaming and not len(rows):
        raise InputError(f"{given}: has no rows")
    for option in images:
        try:
            # Read by our own reader, which is strict and upright, instead of the data set's.
            rows = rows.cast_column(columns[option], datasets.Image(decode=False))
        except Exception as error:  # pyarrow's and datasets' own, of many classes
            kind = rows.features[columns[option]]
            raise InputError(f"--{option} {columns[option]}: holds {kind}, no images") from error
    return rows


def _read_cell(cell: Cell, name: str) -> Image.Image:
    """An image as `datasets` stores it: its bytes, or the path of its file."""
    if not cell or (cell.get("bytes") is None and not cell.get("path")):
        raise InputError(f"{name}: has no image")
    if cell.get("bytes") is not None:
        return read_image(io.BytesIO(cell["bytes"]), name)
    return read_image(cell["path"], name)


def _texts(cell: Any, name: str, column: str) -> list[str]:
    """The captions in a cell: a text or a list of texts, where nothing is a blank one."""
    captions = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        kind = type(captions[0]).__name__
        raise InputError(f"{name}: its {column} is a {kind}, needs a text or a list of texts")
    return [(caption or "").strip() for caption in captions]
