"""The folder of adapters."""

import pytest

from ether_diffusion.demo.library import Library, clean_name
from ether_diffusion.errors import InputError


def test_names_are_cleaned_and_links_out_of_the_folder_are_left_out(tmp_path, adapters):
    assert clean_name(" ../My Dög! ") == "My-D-g"
    with pytest.raises(InputError, match="Name: got '../', needs letters or digits"):
        clean_name("../")
    (tmp_path / "linked").symlink_to(adapters / "toy-1")
    library = Library(tmp_path)
    assert library.adapters() == []
    assert [library.add("dog", adapters / "toy-1") for _ in range(2)] == ["dog", "dog-2"]
    assert [each.name for each in library.adapters()] == ["dog", "dog-2"]
