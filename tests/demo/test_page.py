"""What the page does for clients of its API."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio_client
import numpy as np
import pytest
from gradio_client.utils import Status
from helpers.demo import STEPS, ask, connect, count_steps, generate, images_of
from helpers.scripts import wait_until
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo.settings import read_image


def test_clients_at_once_each_get_what_they_would_get_alone(server):
    requests = [
        (adapters, seed)
        for seed in range(10)
        for adapters in ((("toy-1", 1.0),), (("house-1", 1.0),), (("face-1", 0.7), ("toy-1", 1.2)), ())
    ]
    expected = []
    for adapters, seed in requests:
        (pair,) = generate(server.worker, adapters=adapters, seed=seed).images
        expected.append([np.asarray(image) for image in pair if image is not None])
    clients = [connect(server) for _ in range(8)]

    def all_of(k: int) -> None:
        for number in range(k, len(requests), len(clients)):
            adapters, seed = requests[number]
            got = images_of(ask(clients[k], *adapters, seed=seed).result())
            assert len(got) == 1 + bool(adapters)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected[number], strict=True)), requests[number]

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(all_of, range(len(clients))))


def waits(job, ahead: int) -> bool:
    """Whether a request is in line, and its client was told how many are before it, the present one not counted."""
    return job.status().code is Status.IN_QUEUE and job.status().rank == ahead


LOST_CLIENT = """
import sys, time
from gradio_client import Client
client = Client(sys.argv[1], verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 60})
job = client.submit(
    ["toy-1"], 1, 1, 1, "a toy", "", 150, 5.0, 64, 64, False, 0, 4, api_name="/generate"
)
while not job.outputs():
    time.sleep(0.05)
print("generating", flush=True)
time.sleep(600)
"""


def test_a_killed_client_does_not_hold_up_the_next(server, monkeypatch):
    taken = count_steps(server.worker, monkeypatch)
    lost = subprocess.Popen([sys.executable, "-c", LOST_CLIENT, server.local_url], stdout=subprocess.PIPE, text=True)
    assert lost.stdout.readline() == "generating\n"
    lost.kill()
    lost.wait()
    assert "Done" in ask(connect(server)).result()[0]
    assert len(taken) < 8 * 150  # it was given up midway


def test_requests_wait_in_one_line_and_a_client_cancels_only_its_own(server):
    slow = ask(connect(server), steps=150, count=4)
    wait_until(slow.outputs)
    given_up = ask(connect(server), steps=150, count=4)
    wait_until(lambda: waits(given_up, 0))
    patient = ask(connect(server))
    wait_until(lambda: waits(patient, 1))
    given_up.cancel()
    slow.cancel()
    assert "Done" in patient.result()[0]
    assert not given_up.outputs()


def test_the_line_has_an_end(server, monkeypatch):
    monkeypatch.setattr(server._queue, "max_size", 1)
    slow = ask(connect(server), steps=150, count=4)
    wait_until(slow.outputs)
    waiting = ask(connect(server))
    wait_until(lambda: waits(waiting, 0))
    with pytest.raises(Exception, match="Queue is full"):
        ask(connect(server)).result()
    slow.cancel()
    assert "Done" in waiting.result()[0]


def test_errors_reach_the_client_in_words(client):
    with pytest.raises(Exception, match="Prompt: is empty"):
        ask(client, prompt="").result()
    with pytest.raises(Exception, match="Width: got 37, needs a multiple of 8|37"):
        ask(client, width=37).result()
    assert "Done" in ask(client).result()[0]


def test_settings_come_back_from_a_downloaded_image(client):
    answer = ask(client, ("toy-1", 0.5), seed=3, negative="blue").result()
    base, adapted = (each["image"] for each in answer[2])
    found = read_image(adapted)[0]
    assert (found.seed, found.adapters, found.negative_prompt) == (3, (("toy-1", 0.5),), "blue")
    assert read_image(base)[0].adapters == ()
    restored = client.predict(gradio_client.handle_file(adapted), api_name="/use_settings")
    assert restored[0]["value"] == ["toy-1"] and restored[1] == 0.5 and restored[-3] == 3


def test_a_controlled_image_brings_its_map_back(server, client):
    start = client.predict("scene-map", api_name="/sample_map")
    drawn = start[2]
    assert start[1] and Image.open(drawn["composite"]).size == (512, 512)
    files = {key: drawn[key] and gradio_client.handle_file(drawn[key]) for key in ("background", "composite")}
    sent = {**files, "layers": []}
    told, _, gallery = client.predict("scene-map", start[1], sent, 1.0, 5, STEPS, 5.0, 64, 64, api_name="/control")
    base, steered = (each["image"] for each in gallery)
    settings, control = read_image(steered)
    assert "Done" in told and settings.seed == 5 and read_image(base)[1] is None
    *_, last = server.worker.generate(settings, control=control)
    assert np.array_equal(np.asarray(Image.open(steered)), np.asarray(last.images[0][1]))
    restored = client.predict(gradio_client.handle_file(steered), api_name="/use_map")
    assert restored[0] == "scene-map" and restored[4] == 5 and "settings and the map" in restored[-1]
    assert Image.open(restored[2]["composite"]).convert("RGBA").tobytes() == control.tobytes()
    refused = client.predict(gradio_client.handle_file(steered), api_name="/use_settings")
    assert "was generated under a map; drop it in the tab Control" in refused[-1]
    refused = client.predict(gradio_client.handle_file(base), api_name="/use_map")
    assert "was generated without a map; drop it in the tab Generate" in refused[-1]
    with pytest.raises(Exception, match="Map: is empty"):
        client.predict("scene-map", "a heart", None, 1.0, 5, STEPS, 5.0, 64, 64, api_name="/control")


def test_a_photo_can_be_cut(client, photographs, tmp_path):
    columns = np.arange(240, dtype=np.uint8)  # each column a grey of its own
    Image.fromarray(np.tile(columns, (80, 1))).convert("RGB").save(tmp_path / "wide.png")
    photos = [gradio_client.handle_file(path) for path in (*sorted(photographs.iterdir()), tmp_path / "wide.png")]
    files, *_ = client.predict(photos, 3, 50, 100, 0, api_name="/crop")
    assert [Image.open(file).size for file in files] == [(64, 64)] * 3 + [(40, 40)]
    assert np.array_equal(np.asarray(Image.open(files[3]))[0, :, 0], columns[200:])
    assert "choose a photo first" in client.predict(photos, 7, 50, 100, 0, api_name="/crop")[-1]


def test_a_large_photo_keeps_its_detail_when_it_is_cut(client, photographs, tmp_path):
    Image.new("RGB", (3000, 2000)).save(tmp_path / "large.png")
    photos = [gradio_client.handle_file(tmp_path / "large.png")]
    for size, expected in ((100, 1024), (20, 400)):
        (file,), *_ = client.predict(photos, 0, size, 50, 50, api_name="/crop")
        assert Image.open(file).size == (expected, expected)


def test_a_broken_upload_is_explained_and_a_sound_one_described(client, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    told, *report = client.predict(gradio_client.handle_file(tmp_path / "bad.safetensors"), api_name="/check_file")
    assert "bad.safetensors holds a pickle" in told and str(tmp_path) not in told and "ETHER+" not in str(report)
    sound = SHIPPED / "toy-1" / "pytorch_ether_weights.safetensors"
    told, *report = client.predict(gradio_client.handle_file(sound), api_name="/check_file")
    assert "fits" in told and all(each in str(report) for each in ("ETHER+", "19,968", "Degrees", "°", "to_out.0"))


@pytest.mark.parametrize("to", ["ether", "diffusers-lora", "kohya"])
def test_an_adapter_can_be_taken_along(client, to):
    told, file = client.predict("toy-1", to, api_name="/export")
    assert "toy-1" in told and Path(file).stat().st_size > 10_000
    if to != "kohya":
        pipe = miniature.load_pipeline()
        pipe.load_ether_weights(file) if to == "ether" else pipe.load_lora_weights(file)
