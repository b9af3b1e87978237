"""Which file of a folder is the adapter."""

import shutil

import pytest
import torch
from safetensors.torch import save

from ether_diffusion.adapters.locate import HubSource, find_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import EtherFileError

COMMIT = "0123456789012345678901234567890123456789"
NAMES = [
    "dog.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    ".safetensors",
    "a b.safetensors",
]


@pytest.fixture
def saved(one, tmp_path):
    def save(name: str, folder: str = "dog"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        return shutil.copy(one / WEIGHTS_NAME, tmp_path / folder / name)

    return save


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("subfolder", [None, "inner"])
@pytest.mark.parametrize("beside", [[], ["README.md", "optimizer.bin", "config.json"]])
def test_the_only_file_is_found_whatever_it_is_called(saved, tmp_path, name, subfolder, beside):
    path = saved(name, "dog/inner" if subfolder else "dog")
    for other in beside:
        (path.parent / other).write_bytes(b"{}")
    (path.parent / "folder.safetensors").mkdir()
    found = find_adapter_file(tmp_path / "dog", hub=HubSource(subfolder=subfolder))
    assert found.source == str(path) and set(found.tensors) == {"unet", "text_encoder"}


def test_the_only_file_of_a_cached_repository_is_found(saved, tmp_path):
    repository = tmp_path / "models--someone--dog"
    path = saved("dog.safetensors", f"models--someone--dog/snapshots/{COMMIT}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    found = find_adapter_file("someone/dog", hub=HubSource(cache_dir=tmp_path, local_files_only=True))
    assert found.source == str(path)


def test_of_several_files_none_is_guessed(saved, tmp_path):
    paths = [saved(name) for name in ("b.safetensors", "a.safetensors")]
    with pytest.raises(FileNotFoundError, match=r"it holds a.safetensors, b.safetensors: pass one as weight_name="):
        find_adapter_file(tmp_path / "dog")
    assert find_adapter_file(tmp_path / "dog", weight_name="a.safetensors").source == str(paths[1])
    usual = saved(WEIGHTS_NAME)
    assert find_adapter_file(tmp_path / "dog").source == str(usual)


def test_a_name_that_is_given_is_the_name(saved, tmp_path):
    saved("dog.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no cat.safetensors; it holds dog.safetensors"):
        find_adapter_file(tmp_path / "dog", weight_name="cat.safetensors")


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_the_only_file_is_checked_as_any_other(tmp_path, content):
    (tmp_path / "lora.safetensors").write_bytes(save({"a": torch.ones(2)}) if content is None else content)
    with pytest.raises(EtherFileError, match="lora.safetensors (is not a whole safetensors file|.*no ETHER adapter)"):
        find_adapter_file(tmp_path)
