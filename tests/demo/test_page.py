"""What the page does for clients of its API."""

import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio_client
import numpy as np
import pytest
from helpers.demo import MAX_BATCH, Answer, ask, connect, generate, images_of, told
from helpers.scripts import wait_until
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo.generate_tab import SIDE_BY_SIDE
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


LOST_CLIENT = """
import sys, time
from gradio_client import Client
client = Client(sys.argv[1], verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 60})
job = client.submit(
    ["toy-1"], 1, 1, 1, "a toy", "", 150, 5.0, 64, 64, False, 0, 2, False, None, 0.6, api_name="/generate"
)
while not (job.outputs() and job.outputs()[-1][1]):
    time.sleep(0.05)
print(job.outputs()[-1][1], flush=True)
time.sleep(600)
"""


def test_the_job_of_a_client_that_was_killed_goes_on_and_is_found_by_its_address(server):
    lost = subprocess.Popen([sys.executable, "-c", LOST_CLIENT, server.local_url], stdout=subprocess.PIPE, text=True)
    address = lost.stdout.readline().strip()
    lost.kill()
    lost.wait()
    job = server.board.find(address)
    assert not job.done
    *_, last = job.follow()
    assert len(last.files) == 5  # two pairs, and all on a sheet


def test_jobs_wait_in_one_line_and_each_is_cancelled_by_its_address(server):
    slow = ask(connect(server), steps=150, count=4)
    wait_until(lambda: "of 150" in told(slow))
    given_up = ask(connect(server), steps=150, count=4)
    wait_until(lambda: "In line: 1 job is before yours." in told(given_up))
    patient = ask(connect(server))
    wait_until(lambda: "In line: 2 jobs are before yours." in told(patient))
    other = connect(server)
    for job in (given_up, slow):
        other.predict(job.outputs()[-1][1], api_name="/cancel_generate")
    assert "Done" in patient.result()[0]
    assert all("Cancelled." in job.result()[0] for job in (given_up, slow))


def test_who_does_not_know_the_address_finds_nothing(server):
    answer = Answer(*ask(connect(server)).result())
    job = server.board.find(answer.address)
    assert job.kind == "generate" and server.board.latest("control", job.owner) is None
    assert server.board.latest("generate", "a stranger") is None


def test_strengths_side_by_side_are_one_batch_and_a_sheet(server, client):
    answer = Answer(*ask(client, ("toy-1", 1.0), grid=True).result())
    assert len(answer.files) == len(SIDE_BY_SIDE) + 1
    assert server.worker.engine.counts.largest == MAX_BATCH
    for strength, path in zip(SIDE_BY_SIDE, answer.files, strict=False):
        settings, _ = read_image(path)
        assert settings.adapters == (("toy-1", strength),) and settings.strengths == ()
    assert read_image(answer.files[-1])[0].strengths == SIDE_BY_SIDE
    first, *_, last, _sheet = images_of(answer)
    assert not np.array_equal(first, last)
    with pytest.raises(Exception, match="Strengths side by side: choose an adapter first"):
        ask(client, grid=True).result()


def test_an_image_is_started_from_and_a_painted_part_made_anew(client, tmp_path):
    ground = np.zeros((64, 64, 4), np.uint8)
    ground[..., 3] = 255
    ground[:, :32, 0] = 255
    painted = np.zeros((64, 64, 4), np.uint8)
    painted[:, 40:] = 255
    for name, pixels in (("ground", ground), ("painted", painted)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    background, layer = (gradio_client.handle_file(tmp_path / f"{name}.png") for name in ("ground", "painted"))
    plain = images_of(ask(client, steps=8).result())[0]
    start = {"background": background, "layers": [], "composite": background}
    little = images_of(ask(client, steps=8, start=start, change=0.2).result())[0].astype(int)
    much = images_of(ask(client, steps=8, start=start, change=1.0).result())[0].astype(int)
    there = ground[..., :3].astype(int)
    assert np.abs(little - there).mean() < np.abs(much - there).mean()
    assert not np.array_equal(little, plain)
    start["layers"] = [layer]
    answer = Answer(*ask(client, steps=8, start=start, change=1.0).result())
    (made,) = images_of(answer)
    kept, anew = np.abs(made.astype(int) - there)[:, :24].mean(), np.abs(made.astype(int) - there)[:, 48:].mean()
    assert kept < anew
    assert read_image(answer.files[0])[0].change == 1.0
    restored = client.predict(gradio_client.handle_file(answer.files[0]), api_name="/use_settings")
    assert "It was started from an image" in restored[-1]


def test_what_was_generated_is_kept_for_its_owner_alone(server):
    client, other = connect(server), connect(server)
    answer = Answer(*ask(client, ("toy-1", 1.0), seed=9).result())
    names = [path.name for path in answer.files]
    assert names == ["a-photo-of-sks-toy-on-a-red-background_base_seed-9.png",
                     "a-photo-of-sks-toy-on-a-red-background_toy-1_seed-9.png"]  # fmt: skip
    job = server.board.find(answer.address)
    kept = {Path(path).name for path in server.results.history(job.owner)}
    assert kept == set(names)
    with zipfile.ZipFile(server.results.archive(job.owner)) as archive:
        assert len(archive.namelist()) == 2
    stranger = server.board.find(Answer(*ask(other).result()).address).owner
    assert stranger != job.owner and not kept & {Path(path).name for path in server.results.history(stranger)}


def test_errors_reach_the_client_in_words(client):
    with pytest.raises(Exception, match="Prompt: is empty"):
        ask(client, prompt="").result()
    with pytest.raises(Exception, match="Width: got 37, needs a multiple of 8|37"):
        ask(client, width=37).result()
    assert "Done" in ask(client).result()[0]


def test_settings_come_back_from_a_downloaded_image(client):
    answer = ask(client, ("toy-1", 0.5), seed=3, negative="blue").result()
    base, adapted = Answer(*answer).files
    found = read_image(adapted)[0]
    assert (found.seed, found.adapters, found.negative_prompt) == (3, (("toy-1", 0.5),), "blue")
    assert read_image(base)[0].adapters == ()
    restored = client.predict(gradio_client.handle_file(adapted), api_name="/use_settings")
    assert restored[0]["value"] == ["toy-1"] and restored[1] == 0.5 and restored[11] == 3


def test_a_broken_upload_is_explained_and_a_sound_one_described(client, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    said, *report = client.predict(gradio_client.handle_file(tmp_path / "bad.safetensors"), api_name="/check_file")
    assert "bad.safetensors holds a pickle" in said and str(tmp_path) not in said and "ETHER+" not in str(report)
    sound = SHIPPED / "toy-1" / "pytorch_ether_weights.safetensors"
    said, *report = client.predict(gradio_client.handle_file(sound), api_name="/check_file")
    assert (
        "fits" in said
        and "Moved moderately" in said
        and all(each in str(report) for each in ("ETHER+", "19,968", "Degrees", "°", "to_out.0"))
    )


@pytest.mark.parametrize("to", ["ether", "diffusers-lora", "kohya"])
def test_an_adapter_can_be_taken_along(client, to):
    said, file = client.predict("toy-1", to, api_name="/export")
    assert "toy-1" in said and Path(file).stat().st_size > 10_000
    if to != "kohya":
        pipe = miniature.load_pipeline()
        pipe.load_ether_weights(file) if to == "ether" else pipe.load_lora_weights(file)
