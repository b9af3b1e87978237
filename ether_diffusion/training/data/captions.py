"""Captions of the images in a folder: text files beside them, and the metadata file that lists images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.errors import InputError
from ether_diffusion.images import left_out, some
from ether_diffusion.training.entry import narrate

JSON_NAME, CSV_NAME = "metadata.jsonl", "metadata.csv"
FILE_KEY, CAPTION_KEY = "file_name", "text"
CAPTION_SUFFIXES = (".txt", ".caption")

# Files that people keep captions in, and that are named where they are not read.
CAPTION_LIKE = frozenset(
    {*CAPTION_SUFFIXES, ".cap", ".captions", ".csv", ".json", ".jsonl", ".md", ".parquet", ".tags", ".tsv", ".xml"}
    | {".yaml", ".yml"}
)

MetadataRow = tuple[str, dict[str, Any]]
"""Where a row stands, for messages, and what it holds."""


def captions_in(folder: Path, paths: Sequence[Path], column: str | None, flag: str) -> dict[str, str]:
    """File name -> caption, of the images of a folder that have one; what is not read is named in the log.

    Args:
        folder, paths: the images, and where they lie.
        column: key of the captions in the metadata file; "text" if None.
        flag: what the user gave the folder with, for the messages.

    Raises:
        InputError: captions that cannot be read, or a column without a metadata file.
    """
    beside, files = _captions_beside(folder, paths)
    metadata, rows = read_metadata(folder)
    if metadata is None and column is not None:
        raise InputError(f"--caption_column {column}: there is no {JSON_NAME} in {folder}, and no {CSV_NAME}")
    where = f"NAME.txt, NAME.caption, NAME.jpg.txt, {JSON_NAME} and {CSV_NAME}"
    name_left_out(folder, {*paths, *files, *filter(None, [metadata])}, flag, captions_from=where)
    return beside | _captions_of_rows(folder, rows, CAPTION_KEY if column is None else column)


def name_left_out(
    folder: Path, used: set[Path], flag: str, captions_from: str = f"{JSON_NAME} and {CSV_NAME}"
) -> None:
    """Say in one line what lies in a folder and is not used, and where captions are read from."""
    names = left_out(folder, used)
    captions = [name for name in names if Path(name).suffix.lower() in CAPTION_LIKE]
    others = [name for name in names if name not in captions]
    parts = [f"not read: {some(others)}"] if others else []
    if captions:
        parts.append(f"not read as captions: {some(captions)} (captions come from {captions_from})")
    if parts:
        narrate("%s %s: %s", flag, folder, "; ".join(parts))


def read_metadata(folder: Path) -> tuple[Path | None, list[MetadataRow]]:
    """The metadata file of a folder and its rows, each with a text under "file_name"; None and none without one.

    Raises:
        InputError: a file that cannot be read, a row without a file name, or two files.
    """
    files = [file for file in (folder / JSON_NAME, folder / CSV_NAME) if file.is_file()]
    if not files:
        return None, []
    if len(files) > 1:
        raise InputError(f"{folder}: holds {JSON_NAME} and {CSV_NAME}; one of the two fits, remove the other")
    (file,) = files
    return file, _json_rows(file) if file.name == JSON_NAME else _csv_rows(file)


def _captions_beside(folder: Path, paths: Sequence[Path]) -> tuple[dict[str, str], set[Path]]:
    """File name -> text of a caption file, dog.txt or dog.jpg.txt of dog.jpg; and the files that were read.

    The first that is not blank counts.
    """
    # In the order of their names, .TXT before .txt: of two files that differ in this, the usual one counts.
    files = {(each.stem, each.suffix.lower()): each for each in sorted(folder.iterdir()) if each.is_file()}
    captions, read = {}, set()
    for path in paths:
        for key in ((name, suffix) for name in (path.stem, path.name) for suffix in CAPTION_SUFFIXES):
            if key not in files:
                continue
            read.add(files[key])
            if text := " ".join(_read_text(files[key]).split()):
                captions[path.name] = text
                break
    return captions, read


def _captions_of_rows(folder: Path, rows: Sequence[MetadataRow], key: str) -> dict[str, str]:
    captions: dict[str, str] = {}
    for where, row in rows:
        name = row[FILE_KEY]
        if not (folder / name).is_file() or Path(name).name != name:
            raise InputError(f"{where}: there is no file {name!r} directly in {folder}")
        if not isinstance(row.get(key), str):
            raise InputError(f"{where}: needs a text under {key!r}; its keys are {', '.join(row)}")
        if row[key].strip():
            captions[name] = row[key].strip()
    return captions


def _json_rows(file: Path) -> list[MetadataRow]:
    """One JSON object a line."""
    rows = []
    # At line feeds alone: JSON may hold other characters that Python takes for ends of lines.
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(FILE_KEY), str):
            raise InputError(f"{where}: needs an object with a text under {FILE_KEY!r}")
        rows.append((where, row))
    return rows


def _csv_rows(file: Path) -> list[MetadataRow]:
    """The names of the columns, then one image a row; fields that are missing at its end are blank."""
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), restval="")
    rows = []
    try:
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row:
                raise InputError(f"{where}: has more fields than there are columns; put texts with commas in quotes")
            if not row.get(FILE_KEY):
                raise InputError(f"{where}: needs a text under {FILE_KEY!r}; the columns are {', '.join(row)}")
            rows.append((where, row))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: cannot be read as CSV ({error})") from error
    return rows


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
