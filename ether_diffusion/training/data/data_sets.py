"""Data sets as rows: of the Hub and of folders, as `datasets` reads them, or as a folder of images lists its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.errors import InputError
from ether_diffusion.images import is_image, some
from ether_diffusion.training.data.captions import FILE_KEY, name_left_out, read_metadata
from ether_diffusion.training.data.examples import Row
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.options import ControlDataOptions, InstanceDataOptions

IMAGE_COLUMN = "image"
TABLES = frozenset({".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar"})
"""Suffixes of files that hold data sets, in which images that lie beside them have no part."""


def open_data_set(
    options: InstanceDataOptions | ControlDataOptions, flag: str, *, images: Sequence[str], streaming: bool = False
) -> Any:
    """The rows of the data set that a flag names, on the Hub or in a folder, its images as they are stored.

    Of a folder of images, the rows of its metadata file, or the images that lie in it; of all others, the split train.

    images: those of the options whose columns hold images.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f'--{flag}: the package datasets is missing; pip install "ether-diffusion[datasets]"')
    import datasets

    name = getattr(options, flag)
    given = f"--{flag} {name}"
    columns = {option: getattr(options, option) for option in (*images, "caption_column")}
    listed = None
    if options.dataset_config_name is None and Path(name).is_dir():
        listed = _listed_in(Path(name), flag, [columns[option] for option in images])
    try:
        if listed is None:
            rows = datasets.load_dataset(name, options.dataset_config_name, split="train", streaming=streaming)
        else:
            rows = datasets.Dataset.from_dict(listed)
            rows = rows.to_iterable_dataset() if streaming else rows
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
    if columns["caption_column"] is None:
        _name_texts(rows.features, given)
    return rows


def content_of(row: Row, column: str, folder: Path | None) -> Path | bytes | None:
    """An image as a row of a data set stores it: its bytes, or its file, whose path counts from the data's folder."""
    cell = row[column] or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    return Path(folder or "", cell["path"]) if cell.get("path") else None


def _listed_in(folder: Path, flag: str, images: Sequence[str]) -> Mapping[str, list[Any]] | None:
    """The rows of a folder of images, by columns; None where the folder holds a data set of another kind.

    `datasets` would guess splits from the names of files, and leave out what it takes for another one.
    """
    metadata, found = read_metadata(folder)
    rows = [_named_as_columns(row) for _, row in found]
    if metadata is None:
        rows = [{IMAGE_COLUMN: path.name} for path in sorted(filter(is_image, folder.iterdir()))]
        if not rows or any(path.suffix.lower() in TABLES for path in folder.rglob("*")):
            return None
    texts = [row[column] for row in rows for column in images if isinstance(row.get(column), str)]
    used = {folder / part for text in texts for part in Path(text).parts[:1]}
    name_left_out(folder, used | set(filter(None, [metadata])), f"--{flag}")
    # Rows may lack what others have.
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _named_as_columns(row: Mapping[str, Any]) -> Row:
    """A row of a metadata file with the names of columns that `datasets` gives it."""
    suffix = f"_{FILE_KEY}"
    return {IMAGE_COLUMN if name == FILE_KEY else name.removesuffix(suffix): value for name, value in row.items()}


def _name_texts(features: Mapping[str, Any], given: str) -> None:
    """Say which columns could hold captions, where none was named."""
    names = [name for name, kind in features.items() if _is_text(kind) or _is_text(getattr(kind, "feature", None))]
    if names:
        narrate("%s: not read as captions: %s; --caption_column reads one of them", given, some(names))


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")
