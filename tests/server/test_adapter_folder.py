"""Adapters come, are replaced and go while the server runs; nothing is changed by what is refused."""

import resource
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from helpers.lora import save_adapter
from helpers.scripts import wait_until
from helpers.server import as_image, asked, error_of, images_of, leaving_client, serving
from helpers.serving import NAMES, TARGETS, save_adapters


def upload(running, name: str, content: bytes):
    return running.client.post("/v1/adapters", data={"name": name}, files={"file": ("any.safetensors", content)})


def listing(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def names(running) -> list[str]:
    return [each["id"] for each in running.client.get("/v1/adapters").json()["data"]]


def test_adapters_and_models_are_listed(server, served_adapters_once):
    listed = server.client.get("/v1/adapters").json()["data"]
    assert [each["id"] for each in listed] == sorted(NAMES)
    assert listed[-1]["bytes"] == (served_adapters_once / f"{listed[-1]['id']}.safetensors").stat().st_size
    models = [each["id"] for each in server.client.get("/v1/models").json()["data"]]
    assert models == ["base", *(f"base:{name}" for name in sorted(NAMES))]


def test_an_uploaded_adapter_is_served_at_once(own_server, adapters, alone):
    content = (adapters / "dog.safetensors").read_bytes()
    answer = upload(own_server, "hund", content)
    assert answer.status_code == 201 and answer.json()["id"] == "hund" and answer.json()["bytes"] == len(content)
    (image,) = images_of(own_server.generate(adapter="hund", seed=2))
    assert np.abs(image - as_image(alone.images(asked("dog", seed=2)))).max() <= 1
    assert not [path for path in adapters.iterdir() if path.name.startswith(".")]


def test_requests_that_run_keep_the_adapter_that_is_replaced_or_deleted(own_server, adapters, alone):
    cat = (adapters / "cat.safetensors").read_bytes()
    kept = []
    running = threading.Thread(
        target=lambda: kept.append(own_server.generate(adapter="dog", seed=2, num_inference_steps=60))
    )
    running.start()
    wait_until(lambda: own_server.engine.running == 1)
    assert upload(own_server, "dog", cat).status_code == 201
    (replaced,) = images_of(own_server.generate(adapter="dog", seed=2))
    assert own_server.client.delete("/v1/adapters/dog").json() == {"id": "dog", "object": "adapter", "deleted": True}
    assert own_server.generate(adapter="dog").status_code == 404
    running.join()
    assert np.abs(images_of(kept[0])[0] - as_image(alone.images(asked("dog", seed=2, steps=60)))).max() <= 1
    assert np.abs(replaced - as_image(alone.images(asked("cat", seed=2)))).max() <= 1
    assert own_server.client.delete("/v1/adapters/dog").status_code == 404


def test_a_folder_of_an_adapter_is_deleted_whole_and_not_written_over(own_server, adapters, tiny_pipeline_folder):
    made = save_adapter(adapters / "made", tiny_pipeline_folder, "made", TARGETS, 9)
    made.rename(adapters / "fox")
    assert "fox" in names(own_server)
    refused = upload(own_server, "fox", (adapters / "dog.safetensors").read_bytes())
    assert refused.status_code == 409
    assert own_server.client.delete("/v1/adapters/fox").status_code == 200
    assert not (adapters / "fox").exists()


@pytest.mark.parametrize("name", ["", "../dog", "a/b", ".dog", "..", "a\\b", "a\nb", "\x1b[31m", "d" * 300, "a\x00b"])
def test_names_that_are_paths_or_no_names_are_refused(own_server, adapters, name):
    before = listing(adapters)
    answer = upload(own_server, name, before["dog.safetensors"])
    assert answer.status_code == 400 and listing(adapters) == before and not list(adapters.parent.glob("*.safet*"))


def test_what_is_no_adapter_or_does_not_fit_is_refused_without_paths(
    own_server, adapters, tmp_path, wider_pipeline_folder
):
    wide = save_adapters(tmp_path, wider_pipeline_folder, ["wide"]) / "wide.safetensors"
    whole = (adapters / "dog.safetensors").read_bytes()
    before = listing(adapters)
    for content in (b"", b"no adapter", whole[:-10], wide.read_bytes()):
        answer = upload(own_server, "dog", content)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (422, "adapter_does_not_fit")
        assert str(tmp_path) not in error["message"] and ".tmp" not in error["message"], error["message"]
        assert "dog.safetensors" in error["message"]
        assert listing(adapters) == before
    assert {path.name for path in adapters.iterdir()} == set(before)


def test_a_file_that_is_too_large_is_refused_whether_it_says_so_or_not(own_server, adapters):
    before = listing(adapters)
    assert upload(own_server, "dog", bytes(2**20 + 1)).status_code == 413  # within the room for the rest of the form
    assert upload(own_server, "dog", bytes(2**22)).status_code == 413
    form = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\ndog\r\n--b\r\nContent-Disposition: form-data; '
    form += b'name="file"; filename="f"\r\n\r\n'
    chunks = iter([form, *[bytes(2**20)] * 4, b"\r\n--b--\r\n"])
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert own_server.client.post("/v1/adapters", content=chunks, headers=headers).status_code == 413
    assert listing(adapters) == before


@pytest.mark.parametrize("content", [b"", b"--b--", b"nonsense"])
def test_forms_that_are_none_are_refused(own_server, content):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = own_server.client.post("/v1/adapters", content=content, headers=headers)
    assert answer.status_code == 400 and error_of(answer)


@contextmanager
def full_disk(room: int):
    """No file can grow beyond `room` bytes: a write fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_old_adapter_alone(own_server, adapters):
    before = listing(adapters)
    with full_disk(1000):
        answer = upload(own_server, "dog", before["cat.safetensors"])
    assert (answer.status_code, error_of(answer)["code"]) == (507, "disk_full")
    assert listing(adapters) == before and {path.name for path in adapters.iterdir()} == set(before)


def test_without_uploads_nothing_is_taken_and_nothing_deleted(server, served_adapters_once):
    before = listing(served_adapters_once)
    assert upload(server, "hund", before["dog.safetensors"]).status_code == 403
    assert server.client.delete("/v1/adapters/dog").status_code == 403
    assert listing(served_adapters_once) == before


def test_many_adapters_with_room_for_few_are_read_again_when_they_are_asked_for(tiny_pipeline, adapters, alone):
    with serving(tiny_pipeline, adapters, host_bytes=1) as running, leaving_client(running):
        for name in NAMES:
            (image,) = images_of(running.generate(adapter=name, seed=4))
            assert np.abs(image - as_image(alone.images(asked(name, seed=4)))).max() <= 1
        assert running.metric("adapter_loads_total") == 4 and running.metric("adapter_host_bytes") == 0
