"""Captions: every way in which people keep them is read, and what is not read is named."""

import json

import datasets
import pytest
from helpers.images import gradient

from ether_diffusion.errors import InputError
from ether_diffusion.training.data import find_examples
from ether_diffusion.training.options import InstanceDataOptions

PROMPT = "a photo of sks toy"


@pytest.fixture
def told(caplog):
    """What the log says."""
    caplog.set_level("INFO")
    return caplog


def find(folder, **given):
    return find_examples(InstanceDataOptions(instance_prompt=PROMPT, instance_data_dir=str(folder), **given))


def captions(folder, **given) -> list[str]:
    return [example.captions[0] for example in find(folder, **given)]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png", "c.png", "d.png"):
        gradient().save(tmp_path / name)
    return tmp_path


ROWS = [("a.jpg", "first, with a comma"), ("c.png", "third\u2028of two lines")]


def write_json(folder, rows=ROWS, ending="\n"):
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows]
    (folder / "metadata.jsonl").write_bytes(ending.join(lines).encode())


def write_csv(folder, rows=ROWS, ending="\n"):
    lines = ["file_name,text,year", *(f'{name},"{text}",1999' for name, text in rows)]
    (folder / "metadata.csv").write_bytes(ending.join(lines).encode("utf-8-sig"))


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.TXT", "a.Txt", "a.caption", "a.CAPTION", "a.jpg.txt", "a.jpg.TXT", "a.jpg.caption"],
)
def test_a_caption_beside_its_image_is_read_however_its_file_is_called(folder, told, name):
    (folder / name).write_text("sks toy\n on a beach\n")
    examples = find(folder)
    assert [example.captions[0] for example in examples] == ["sks toy on a beach", *[PROMPT] * 3]
    assert examples.describe() == "4 images, 1 with captions" and told.messages == []


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("write", [write_json, write_csv])
def test_captions_in_metadata_are_read_in_either_format(folder, told, write, ending):
    write(folder, ending=ending)
    (folder / "b.caption").write_text("second")
    (folder / "c.txt").write_text("not this")
    examples = find(folder)
    wanted = ["first, with a comma", "second", "third\u2028of two lines", PROMPT]
    assert [example.captions[0] for example in examples] == wanted
    assert examples.describe() == "4 images, 3 with captions" and told.messages == []


def test_another_column_of_a_csv_file_is_read(folder):
    write_csv(folder)
    assert captions(folder, caption_column="year") == ["1999", PROMPT, "1999", PROMPT]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,text\na.jpg,x\n", "metadata.csv, line 2: needs a text under 'file_name'; the columns are name, text"),
        ("file_name,text\na.jpg,one, two\n", "line 2: has more fields than there are columns; put texts with commas"),
        ("file_name,text\n,x\n", "line 2: needs a text under 'file_name'"),
        ("file_name,text\nz.png,x\n", "line 2: there is no file 'z.png' directly in"),
        ("file_name,words\na.jpg,x\n", "line 2: needs a text under 'text'; its keys are file_name, words"),
        ("file_name,text\na.jpg,\0\n" + "x" * 200_000, "cannot be read as CSV|there is no file|needs a text"),
        ("file_name,text\na.jpg,\udcff", "cannot be read as UTF-8"),
    ],
)
def test_a_bad_csv_file_names_the_line(folder, content, message):
    (folder / "metadata.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        find(folder)


def test_a_caption_that_is_no_valid_unicode_is_named(folder):
    (folder / "metadata.jsonl").write_text(r'{"file_name": "b.png", "text": "half of a \ud83d"}')
    with pytest.raises(InputError, match=r"b.png: its caption 'half of a \\ud83d' is no valid Unicode"):
        find(folder)


def test_metadata_in_two_files_is_refused(folder):
    write_json(folder)
    write_csv(folder)
    with pytest.raises(InputError, match="holds metadata.jsonl and metadata.csv; one of the two fits"):
        find(folder)


@pytest.mark.parametrize(
    "name",
    ["e.txt", "e.caption", "b.jpg.txt", "captions.json", "metadata.json", "metadata.parquet", "Metadata.CSV", "a.json"]
    + ["captions.tsv", "a.tags", "a.md", "captions.yaml"],
)
def test_a_file_that_looks_like_captions_and_is_not_read_is_named(folder, told, name):
    (folder / "c.txt").write_text("third")
    (folder / name).write_text("{}")
    assert captions(folder) == [PROMPT, PROMPT, "third", PROMPT]
    assert told.messages == [
        f"--instance_data_dir {folder}: not read as captions: {name} (captions come from NAME.txt, NAME.caption, "
        "NAME.jpg.txt, metadata.jsonl and metadata.csv)"
    ]


def test_of_two_captions_of_an_image_the_other_is_named(folder, told):
    (folder / "a.txt").write_text("this")
    (folder / "a.jpg.txt").write_text("not this")
    assert captions(folder)[0] == "this"
    assert len(told.messages) == 1 and "not read as captions: a.jpg.txt (" in told.messages[0]


def test_a_blank_caption_leaves_the_place_to_the_next(folder, told):
    (folder / "a.txt").write_text(" \n")
    (folder / "a.caption").write_text("this")
    assert captions(folder)[0] == "this" and told.messages == []


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_captions_of_a_data_set_that_are_not_asked_for_are_named(folder, told, kind):
    if kind == "folder":
        write_json(folder, [("a.jpg", "one"), ("b.png", "two"), ("c.png", "three"), ("d.png", "four")])
    else:
        image = {"bytes": (folder / "a.jpg").read_bytes(), "path": None}
        folder = folder / "set"
        folder.mkdir()
        rows = {"image": [image] * 2, "text": ["one", "two"], "tags": [["x"], []], "number": [1, 2]}
        features = datasets.Features(
            image=datasets.Image(),
            text=datasets.Value("string"),
            tags=datasets.List(datasets.Value("string")),
            number=datasets.Value("int64"),
        )
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    given = {"instance_prompt": PROMPT, "dataset_name": str(folder)}
    examples = find_examples(InstanceDataOptions(**given))
    columns = "text" if kind == "folder" else "text, tags"
    assert told.messages == [
        f"--dataset_name {folder}: not read as captions: {columns}; --caption_column reads one of them"
    ]
    assert examples.describe() == f"{len(examples)} images, none with captions"
    told.clear()
    examples = find_examples(InstanceDataOptions(**given, caption_column="text"))
    assert told.messages == [] and examples.describe() == f"{len(examples)} images, {len(examples)} with captions"


def test_images_that_are_not_read_are_named_in_one_line_with_what_looks_like_captions(folder, told):
    for name in ("b.jxl", "raw.nef", "notes.txt", "a.txt"):
        (folder / name).write_text("x")
    (folder / "more").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    find(folder)
    (line,) = told.messages
    others, captions_like = line.split("; ")
    assert others == (
        f"--instance_data_dir {folder}: not read: b.jxl, gone.jpg (a broken link), more/ (a folder), raw.nef"
    )
    assert captions_like.startswith("not read as captions: notes.txt (captions come from NAME.txt")
