"""The store reads an adapter when its file is new, holds what the memory allows, and knows only its folder's names."""

import os
import threading
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.serving.store import Store, UnknownAdapter


@dataclass
class Held:
    text: str

    @property
    def nbytes(self) -> int:
        return len(self.text)


def read(path) -> Held:
    """A file's text; of a folder, that of its only file."""
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    return Held(file.read_text())


def write(folder, name, text):
    """As those who write adapters do: in one step."""
    (folder / "new").write_text(text)
    os.replace(folder / "new", folder / f"{name}.safetensors")


@pytest.fixture
def folder(tmp_path):
    for name in ("dog", "cat", "mouse"):
        write(tmp_path, name, f"a {name}")
    return tmp_path


def test_names_are_those_of_files_and_folders(folder):
    (folder / "bird").mkdir()
    (folder / "bird" / "pytorch_ether_weights.safetensors").write_text("a bird")
    (folder / "empty").mkdir()
    (folder / "readme.txt").write_text("")
    (folder / ".hidden.safetensors").write_text("")
    store = Store(folder, read, limit=99)
    assert store.names() == ["bird", "cat", "dog", "mouse"]
    assert store.get("bird").text == "a bird"


@pytest.mark.parametrize("name", ["with spaces", "🐕 dog", "a.b", "ünï", "-x", "%2e%2e"])
def test_any_name_that_a_file_can_have_fits(folder, name):
    write(folder, name, "x")
    assert Store(folder, read, limit=99).get(name).text == "x"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../dog", "/etc/passwd", "a/b", "a\\b", "dog\0", ".hidden", "x" * 999, "\ud800"]
)
def test_a_name_is_no_path(tmp_path, folder, name):
    inside = folder / "inside"
    inside.mkdir()
    with pytest.raises(UnknownAdapter) as caught:
        Store(inside, read, limit=99).get(name)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_lists_near_ones_or_what_there_is(folder):
    store = Store(folder, read, limit=99)
    with pytest.raises(UnknownAdapter, match="'dgo'; near it: dog"):
        store.get("dgo")
    with pytest.raises(UnknownAdapter, match="'zzz'; there are cat, dog, mouse"):
        store.get("zzz")


def test_a_file_and_a_folder_of_one_name_are_refused(folder):
    (folder / "dog").mkdir()
    (folder / "dog" / "pytorch_ether_weights.safetensors").write_text("")
    with pytest.raises(InputError, match="both a file and a folder"):
        Store(folder, read, limit=99).get("dog")


def test_a_file_is_read_again_when_it_is_another_and_only_then(folder):
    store = Store(folder, read, limit=99)
    first = store.get("dog")
    assert store.get("dog") is first and store.loads == 1
    stat = (folder / "dog.safetensors").stat()
    write(folder, "dog", "b dog")  # of the same size, and with the same time
    os.utime(folder / "dog.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.get("dog").text == "b dog" and first.text == "a dog"
    (folder / "dog.safetensors").unlink()
    with pytest.raises(UnknownAdapter):
        store.get("dog")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(folder):
    done = []

    def slow(path):
        held = read(path)
        if not done:
            done.append(write(folder, "dog", "a new dog"))
        return held

    assert Store(folder, slow, limit=99).get("dog").text == "a new dog"


def test_a_file_that_changes_all_the_time_and_one_that_is_broken_are_errors(folder):
    def changing(path):
        write(folder, "dog", "x" * len(str(threading.get_ident())) + str(os.urandom(4)))
        return read(path)

    with pytest.raises(EtherFileError, match="changed each of"):
        Store(folder, changing, limit=99).get("dog")

    def broken(path):
        raise EtherFileError("no adapter")

    store = Store(folder, broken, limit=99)
    with pytest.raises(EtherFileError, match="no adapter"):
        store.get("cat")
    assert store.nbytes == 0


def test_an_adapter_larger_than_the_memory_is_used_and_not_held(folder):
    store = Store(folder, read, limit=3)
    assert store.get("dog").text == "a dog" and store.nbytes == 0


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Store(tmp_path / "none", read, limit=1)


def test_many_threads_get_what_they_ask_for(folder):
    store, wrong = Store(folder, read, limit=11), []

    def ask(name):
        for _ in range(50):
            if store.get(name).text != f"a {name}":
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("dog", "cat", "mouse") * 2]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong and store.nbytes <= 11


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans(), st.integers(0, 6)), max_size=30))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_and_asked_for_the_newest_is_given_and_the_limit_kept(tmp_path_factory, plan):
    folder, texts = tmp_path_factory.mktemp("store"), {}
    store = Store(folder, read, limit=8)
    for name, writes, size in plan:
        if writes:
            texts[name] = f"{len(texts)}" * size
            write(folder, name, texts[name])
        elif name in texts:
            assert store.get(name).text == texts[name]
        else:
            with pytest.raises(UnknownAdapter):
                store.get(name)
        assert store.nbytes <= 8
