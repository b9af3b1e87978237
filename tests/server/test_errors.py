"""What is answered to what goes wrong."""

import pickle

import pytest

from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.server.errors import ApiError, of_engine, of_file
from ether_diffusion.serving import Cancelled, DeadlineExceeded, EngineClosed, EngineFull, UnknownAdapter


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownAdapter("no dog"), 404),
        (EngineFull("full"), 429),
        (DeadlineExceeded("late"), 504),
        (Cancelled("cancelled"), 499),
        (EngineClosed("closed at /root"), 503),
        (InputError("no size"), 400),
        (MemoryError(), 500),
        (RuntimeError("of /root/secret"), 500),
    ],
)
def test_each_error_of_the_engine_has_its_status(error, status):
    answered = of_engine(error)
    assert answered.status == status and "/root" not in answered.message


def test_only_what_may_be_asked_again_says_when():
    assert of_engine(EngineFull("full"), retry_after=7).headers == {"Retry-After": "7"}
    assert of_engine(InputError("no size"), retry_after=7).headers == {}


def test_an_error_about_a_file_leaves_out_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, tmp_path.relative_to(tmp_path.parent)):
        told = of_file(EtherFileError(f"{folder}/dog.safetensors: is damaged, see {tmp_path}/x"), folder, "dog")
        assert (told.status, told.message) == (422, "dog.safetensors: is damaged, see x")
    assert of_file(OSError(28, "No space left", "/root/x"), tmp_path, "dog").status == 507
    other = of_file(PermissionError(13, "Permission denied", "/root/x"), tmp_path, "dog")
    assert other.status == 500 and "/root" not in other.message


def test_an_error_passes_between_processes_as_it_is():
    sent = ApiError(429, "full", param="n", code="line_full", retry_after=3)
    arrived = pickle.loads(pickle.dumps(sent))
    assert (arrived.status, arrived.content, arrived.headers) == (429, sent.content, {"Retry-After": "3"})
