"""The folder of adapters."""

import re
import unicodedata

import pytest

from ether_diffusion.demo.library import OWNERS_NAME, Library, clean_name
from ether_diffusion.errors import InputError


@pytest.mark.parametrize("name", ["my-dog", "perro pequeño", "我的狗", "v1.5 final", "👩‍🚀 cat", "Ünïcode_2"])
def test_a_name_in_any_script_is_kept_as_it_was_typed(tmp_path, adapters, name):
    assert clean_name(f" {name} ") == unicodedata.normalize("NFC", name)
    library = Library(tmp_path)
    assert library.add(clean_name(name), adapters / "toy-1") == name
    assert [each.name for each in library.adapters()] == [name] and library.get(name).problem is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../", "has /"),
        ("a:b", "has :"),
        ("", "is empty"),
        (".hidden", "begins or ends with a dot"),
        ("dot.", "begins or ends with a dot"),
        ("a\nb", "has characters that cannot be shown"),
        ("x" * 41, "is longer than 40 letters"),
        ("\u202egod", "has characters that cannot be shown"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused_with_the_reason(name, reason):
    with pytest.raises(InputError, match=f"which {re.escape(reason)}; such as"):
        clean_name(name)


def test_links_out_of_the_folder_are_left_out_and_names_that_are_taken_numbered(tmp_path, adapters):
    (tmp_path / "linked").symlink_to(adapters / "toy-1")
    library = Library(tmp_path)
    assert library.adapters() == []
    assert [library.add("dog", adapters / "toy-1") for _ in range(2)] == ["dog", "dog-2"]
    assert [each.name for each in library.adapters()] == ["dog", "dog-2"]


def test_an_owner_alone_renames_and_deletes_also_after_a_restart(tmp_path, adapters):
    library = Library(adapters, tmp_path)
    name = library.add("dog", adapters / "toy-1", "me")
    assert library.belongs_to(name, "me") and not library.belongs_to(name, "you")
    assert not library.belongs_to("toy-1", "me") and not library.belongs_to(name, "")
    again = Library(adapters, tmp_path)
    for refused in (
        lambda: again.rename(name, "cat", "you"),
        lambda: again.delete(name, "you"),
        lambda: again.delete("toy-1", "me"),
        lambda: again.rename(name, "toy-1", "me"),
        lambda: again.replace(name, b"", "you"),
        lambda: again.delete("../dog", "me"),
    ):
        with pytest.raises(InputError):
            refused()
        assert again.get(name).path.is_file()
    assert again.rename(name, "chien fidèle", "me") == "chien fidèle"
    assert again.belongs_to("chien fidèle", "me") and name not in again.names()
    again.delete("chien fidèle", "me")
    assert "chien fidèle" not in again.names() and not list(tmp_path.glob("*/"))
    assert "me" not in (tmp_path / OWNERS_NAME).read_text("utf-8")
