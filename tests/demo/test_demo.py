"""The web demo without a browser: the worker alone, and the server as clients of its API see it."""

import json
import os
import subprocess
import sys
import threading
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import wait_until
from PIL import Image

gradio_client = pytest.importorskip("gradio_client")
httpx = pytest.importorskip("httpx")

import ether_diffusion  # noqa: E402
from ether_diffusion import miniature  # noqa: E402
from ether_diffusion.commands.demo import SHIPPED, add_arguments, serve  # noqa: E402
from ether_diffusion.commands.main import main  # noqa: E402
from ether_diffusion.control.encoder import ControlEncoder  # noqa: E402
from ether_diffusion.control.pipelines import EtherControlPipeline  # noqa: E402
from ether_diffusion.demo import jobs, training  # noqa: E402
from ether_diffusion.demo import page as page_module  # noqa: E402
from ether_diffusion.demo import worker as worker_module  # noqa: E402
from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating  # noqa: E402
from ether_diffusion.demo.library import Library, clean_name  # noqa: E402
from ether_diffusion.demo.settings import LARGEST_MAP, Settings, read_image, save_image  # noqa: E402
from ether_diffusion.demo.training import Trainings, cut_square, read_photo  # noqa: E402
from ether_diffusion.demo.worker import Worker  # noqa: E402
from ether_diffusion.errors import InputError  # noqa: E402

PROMPT = "a photo of sks toy on a red background"
STEPS = 2


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder with the shipped adapters, a control adapter, and a file that is none."""
    folder = tmp_path_factory.mktemp("adapters")
    for each in SHIPPED.iterdir():
        (folder / each.name).mkdir()
        for file in each.iterdir():
            (folder / each.name / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    pipe = EtherControlPipeline.from_pipe(miniature.load_pipeline())
    encoder = ControlEncoder.for_unet(pipe.unet, factor=pipe.vae_scale_factor)
    torch.nn.init.normal_(encoder.embedding.conv_out.weight, std=0.2)
    pipe.add_control("map", encoder)
    pipe.save_ether_weights(folder / "map", "map")
    (folder / "broken.safetensors").write_bytes(b"no adapter")
    return folder


@pytest.fixture(scope="module")
def worker(adapters):
    worker = Worker(miniature.FOLDER, Library(adapters), device="cpu")
    yield worker
    worker.close()


def flags(**given: object) -> Namespace:
    usual = {"base": None, "adapters": None, "host": "127.0.0.1", "port": 0, "share": False, "auth": None}
    return Namespace(**usual | {"device": "cpu"} | given)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo as its command starts it, on a free port; `server.url` is where."""
    page = serve(flags(), tmp_path_factory.mktemp("served"))
    yield page
    page.close()
    page.worker.close()


@pytest.fixture
def client(server):
    return connect(server)


def connect(server) -> "gradio_client.Client":
    patient = {"timeout": 60}
    return gradio_client.Client(server.local_url, verbose=False, analytics_enabled=False, httpx_kwargs=patient)


def generate(worker: Worker, **settings: object) -> Generated:
    settings = {"prompt": PROMPT, "steps": STEPS} | settings
    *_, last = worker.submit(Settings(**settings), "test").events()
    return last


def ask(client, *adapters: tuple[str, float], seed: int = 0, steps: int = STEPS, **others: object):
    """What the page answers: (status, preview, gallery, seed)."""
    strengths = [strength for _, strength in adapters] + [1.0] * 3
    others = {"prompt": PROMPT, "negative": "", "width": 64, "height": 64, "draw": False, "count": 1} | others
    return client.submit(
        [name for name, _ in adapters], *strengths[:3], others["prompt"], others["negative"], steps, 5.0,
        others["width"], others["height"], others["draw"], seed, others["count"], api_name="/generate",
    )  # fmt: skip


def pictures(answer) -> list[np.ndarray]:
    return [np.asarray(Image.open(each["image"])) for each in answer[2]]


# The worker -----------------------------------------------------------------------------------------------------


def test_shipped_adapters_fit_and_change_the_image(worker):
    offered = [each for each in worker.library.adapters() if (SHIPPED / each.name).is_dir()]
    shipped = [each for each in offered if not each.is_control]
    assert len(shipped) == 3
    for adapter in shipped:
        assert worker.fit(adapter) == "fits" and adapter.image is not None and "a photo of" in adapter.prompt
        ((base, adapted),) = generate(worker, adapters=((adapter.name, 1.0),)).images
        assert np.asarray(base).tolist() != np.asarray(adapted).tolist()


def test_strength_zero_is_the_base_and_a_seed_repeats(worker):
    stock = miniature.load_pipeline()
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = np.asarray(stock(PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, generator=generator).images[0])
    for strength in (1.0, 0.0):
        ((base, adapted),) = generate(worker, seed=5, adapters=(("toy-1", strength), ("house-1", strength))).images
        assert np.array_equal(np.asarray(base), expected)
        assert np.array_equal(np.asarray(adapted), expected) == (strength == 0.0)


def test_a_crash_is_told_and_the_next_request_is_served(worker, monkeypatch, caplog):
    before = generate(worker, adapters=(("toy-1", 1.0),))
    stock = type(worker.pipe).__call__

    def fails(self, prompt, **arguments):
        if prompt == "crash":
            raise RuntimeError("a wire is loose")
        if prompt == "fill the memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 TB")
        return stock(self, prompt, **arguments)

    fails.__signature__ = worker_module.inspect.signature(stock)
    monkeypatch.setattr(type(worker.pipe), "__call__", fails)
    with pytest.raises(Failed, match="a wire is loose.*starts afresh"):
        generate(worker, prompt="crash", adapters=(("house-1", 1.0),))
    with pytest.raises(Failed, match="not enough memory for a picture of 64×64 pixels. A smaller"):
        generate(worker, prompt="fill the memory")
    after = generate(worker, adapters=(("toy-1", 1.0),))
    assert np.array_equal(np.asarray(before.images[0][1]), np.asarray(after.images[0][1]))


def test_news_say_the_place_in_line_and_the_step_and_show_a_preview(worker):
    jobs = [worker.submit(Settings(prompt=PROMPT, steps=8), f"owner {k}") for k in range(3)]
    news = list(jobs[0].events())
    steps = [each for each in news if isinstance(each, Generating)]
    assert [each.step for each in steps] == sorted({each.step for each in steps}) and steps[-1].steps == 8
    assert any(each.preview is not None for each in steps)
    assert all(isinstance(list(job.events())[-1], Generated) for job in jobs[1:])


def test_whoever_cancels_or_leaves_is_skipped(worker, monkeypatch):
    with worker._model:  # nobody is served meanwhile
        first = worker.submit(Settings(prompt=PROMPT, steps=100), "impatient")
        second = worker.submit(Settings(prompt=PROMPT, steps=STEPS), "patient")
        worker.cancel("impatient")
        if first is not worker._current:
            assert isinstance(first._error, Cancelled)  # at once, not when its turn comes
    with pytest.raises(Cancelled):
        list(first.events())
    assert isinstance(list(second.events())[-1], Generated)
    monkeypatch.setattr(jobs, "ABANDONED_AFTER", 0.2)
    gone = worker.submit(Settings(prompt=PROMPT, steps=100), "gone")  # nobody ever asks for its news
    wait_until(lambda: gone._error is not None, 30)
    assert isinstance(gone._error, Cancelled)


def test_a_line_has_an_end(worker):
    with worker._model:
        jobs = [worker.submit(Settings(prompt=PROMPT), "greedy")]
        with pytest.raises(InputError, match="the line is full"):
            for _ in range(worker_module.MOST_PER_OWNER + 2):
                jobs.append(worker.submit(Settings(prompt=PROMPT), "greedy"))
        worker.cancel("greedy")
    for job in jobs:
        with pytest.raises(Cancelled):
            list(job.events())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "  "}, "Prompt: is empty"),
        ({"steps": 0}, "Steps: got 0, needs a whole number from 1 to 150"),
        ({"width": 60}, "Width: got 60, needs a multiple of 8 from 32 to 128"),
        ({"adapters": (("toy-1", 2.0),)}, "Strength of toy-1: got 2.0, needs a number from 0 to 1.5"),
        ({"adapters": (("../toy-1", 1.0),)}, "there is no adapter '../toy-1'; on offer are broken, face-1"),
        ({"adapters": (("broken", 1.0),)}, "the adapter broken cannot be used: .*broken.safetensors is not a whole"),
        ({"adapters": (("map", 1.0),)}, "Control adapters are used one at a time, with a map"),
        ({"guidance": float("nan")}, "Guidance: got nan"),
    ],
)
def test_what_cannot_be_generated_is_said(worker, settings, message):
    with pytest.raises(InputError, match=message):
        generate(worker, **settings)


def test_a_control_adapter_steers_with_its_map_and_leaves_no_trace(worker):
    settings = Settings(prompt=PROMPT, steps=STEPS, adapters=(("map", 1.0),))
    board = Image.fromarray(np.kron(np.eye(8, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8)))
    plain = generate(worker).images[0][0]
    *_, last = worker.submit(settings, "test", control=board).events()
    assert not np.array_equal(np.asarray(last.images[0][0]), np.asarray(last.images[0][1]))
    assert np.array_equal(np.asarray(generate(worker).images[0][0]), np.asarray(plain))


# Settings and library -------------------------------------------------------------------------------------------


def test_a_image_carries_its_settings(tmp_path):
    settings = Settings(prompt="ein Bär", adapters=(("toy-1", 0.5),), seed=7, width=96)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    assert read_image(tmp_path / "a.png") == (settings, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: holds no settings"):
        read_image(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(InputError, match="c.png: is not a PNG image"):
        read_image(tmp_path / "c.png")
    with pytest.raises(InputError, match="cannot be read"):
        Settings.from_json(json.dumps({"prompt": "a", "os": "rm"}))


def test_a_image_carries_its_map_within_bounds(tmp_path):
    settings, board = Settings(prompt="a map", adapters=(("scene-map", 1.0),)), Image.new("RGBA", (9, 7), "teal")
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings, board)
    found, control = read_image(tmp_path / "a.png")
    assert found == settings and control.size == (9, 7) and control.tobytes() == board.tobytes()
    save_image(Image.new("RGB", (8, 8)), tmp_path / "b.png", settings, Image.new("L", (LARGEST_MAP + 1, 1)))
    with pytest.raises(InputError, match="b.png: the map in it has 2049×1 pixels; 2048 a side at most fit"):
        read_image(tmp_path / "b.png")


def test_the_shipped_control_adapter_comes_with_the_map_of_its_image(worker):
    (adapter,) = (each for each in Library(SHIPPED).adapters() if each.is_control)
    settings, control = read_image(adapter.image)
    *_, last = worker.submit(settings, "test", control=control).events()
    ((base, steered),) = last.images
    with Image.open(adapter.image) as shown:
        expected = np.asarray(shown.convert("RGB"), np.float32)
    # Processors round differently; another image differs by much more.
    assert np.abs(np.asarray(steered, np.float32) - expected).mean() < 4
    assert np.abs(np.asarray(base, np.float32) - expected).mean() > 8


def test_a_photo_with_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match="large.png: has 60,000,000 pixels; 50,000,000 at most fit"):
        read_photo(tmp_path / "large.png", 256)
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no.png: is not an image that can be read"):
        read_photo(tmp_path / "no.png", 256)


def test_names_are_cleaned_and_links_out_of_the_folder_are_left_out(tmp_path, adapters):
    assert clean_name(" ../My Dög! ") == "My-D-g"
    with pytest.raises(InputError, match="Name: got '../', needs letters or digits"):
        clean_name("../")
    (tmp_path / "linked").symlink_to(adapters / "toy-1")
    library = Library(tmp_path)
    assert library.adapters() == []
    assert [library.add("dog", adapters / "toy-1") for _ in range(2)] == ["dog", "dog-2"]
    assert [each.name for each in library.adapters()] == ["dog", "dog-2"]


# Trainings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_line(worker, photographs):
    """in_line(owner) -> the news of a training, which nothing has asked for yet."""
    trainings = Trainings(worker)
    photos = sorted(photographs.iterdir())

    def call(owner: str):
        return trainings.train(photos, name="toy", word="toy", method="ether", owner=owner, steps=2)

    call.trainings = trainings
    yield call
    trainings.close()


def test_trainings_wait_their_turn_and_a_place_that_is_given_up_is_free(in_line):
    first, second, third, fourth = (in_line(owner) for owner in ("first", "second", "third", "fourth"))
    assert [next(each).place for each in (first, second, third, fourth)] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="a training of yours is in line already"):
        next(in_line("third"))
    in_line.trainings.stop("second")
    with pytest.raises(Cancelled):
        next(second)
    third.close()  # its page was closed
    assert next(fourth).place == 1
    in_line.trainings.stop("first")
    with pytest.raises(Cancelled):
        list(first)
    assert next(fourth).place == 0
    fourth.close()
    assert next(in_line("fourth")).place == 0


def test_a_training_that_nobody_asks_for_makes_room(in_line, monkeypatch):
    lost, patient = in_line("lost"), in_line("patient")
    assert (next(lost).place, next(patient).place) == (0, 1)
    process = in_line.trainings._line[0].process
    monkeypatch.setattr(training, "ABANDONED_AFTER", 0.5)
    while next(patient).place:
        pass  # asks again a second later
    assert process.poll() is not None  # two would share the memory
    patient.close()


def test_the_line_of_trainings_has_an_end(in_line, monkeypatch):
    monkeypatch.setattr(training, "LONGEST_LINE", 1)
    running = in_line("one")
    next(running)
    with pytest.raises(InputError, match=r"the line is full \(1 trainings\)"):
        next(in_line("another"))
    running.close()


# The server -----------------------------------------------------------------------------------------------------


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
            got = pictures(ask(clients[k], *adapters, seed=seed).result())
            assert len(got) == 1 + bool(adapters)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected[number], strict=True)), requests[number]

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(all_of, range(len(clients))))


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


def test_a_killed_client_does_not_hold_up_the_next(server):
    lost = subprocess.Popen([sys.executable, "-c", LOST_CLIENT, server.local_url], stdout=subprocess.PIPE, text=True)
    assert lost.stdout.readline() == "generating\n"
    wait_until(lambda: server.worker._current)
    job = server.worker._current
    assert job.settings.steps == 150
    lost.kill()
    lost.wait()
    assert "Done" in ask(connect(server)).result()[0]
    assert isinstance(job._error, Cancelled)  # it was given up midway


def test_a_client_cancels_only_its_own(server):
    one, other = connect(server), connect(server)
    slow = ask(one, steps=150, count=4)
    wait_until(lambda: slow.outputs())
    waiting = ask(other)
    wait_until(lambda: any("1 before yours" in each[0] for each in waiting.outputs()))
    one.predict(api_name="/cancel")
    assert "Cancelled" in slow.result()[0]
    assert "Done" in waiting.result()[0]


def test_errors_reach_the_client_in_words(client):
    with pytest.raises(Exception, match="Prompt: is empty"):
        ask(client, prompt="").result()
    with pytest.raises(Exception, match="Width: got 37, needs a multiple of 8|37"):
        ask(client, width=37).result()
    assert "Done" in ask(client).result()[0]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(Path(__file__).resolve()), str(miniature.FOLDER / "model_index.json")]
)
def test_no_other_file_is_served_or_taken_as_an_upload(server, path):
    for prefix in ("/gradio_api/file=", "/file="):
        assert httpx.get(f"{server.local_url.rstrip('/')}{prefix}{path}").status_code in (403, 404)
    # Past the client, which would upload the file first.
    calls = f"{server.local_url}gradio_api/call/check_file"
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    event = httpx.post(calls, json=data).json()["event_id"]
    answer = httpx.get(f"{calls}/{event}", timeout=60).text
    assert "event: error" in answer and "event: complete" not in answer


def test_nothing_is_fetched_for_somebody_or_from_elsewhere(server):
    answer = httpx.get(server.local_url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for tag in ("<script src=", "<link"):
        for part in answer.text.split(tag)[1:]:
            assert "http" not in part.split(">")[0].replace(server.local_url, ""), part[:200]
    assert "fonts.googleapis" not in answer.text
    assert httpx.get(f"{server.local_url}gradio_api/file=http://example.com/a.png").status_code == 403


def test_uploads_are_bounded(server):
    upload = f"{server.local_url}gradio_api/upload"
    assert httpx.post(upload, content=iter([b"of unknown length"])).status_code == 413
    connection = HTTPConnection(server.local_url.split("/")[2])
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    for path in ("call/generate", "component_server"):
        answer = httpx.post(f"{server.local_url}gradio_api/{path}", content=iter([b"of unknown length"]))
        assert answer.status_code == 413
    large = {"files": ("a.png", bytes(21_000_000))}
    assert httpx.post(upload, files=large, timeout=60).status_code == 413


def test_who_asks_for_a_password_lets_nobody_else_in(server, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # `serve` sets it; it is put back
    page = serve(flags(auth="ann:secret"), tmp_path)
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        assert httpx.post(f"{page.local_url}gradio_api/call/generate", json={"data": []}).status_code == 401
        assert gradio_client.Client(page.local_url, auth=("ann", "secret"), verbose=False, analytics_enabled=False)
    finally:
        page.close()
        page.worker.close()


def test_the_page_is_for_this_machine_unless_flags_say_otherwise(tmp_path, monkeypatch):
    """Gradio's own `launch` is left out here: --share would open a tunnel."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", str(tmp_path)))
    launched = []
    monkeypatch.setattr(page_module.gr.Blocks, "launch", lambda self, **options: launched.append(options))
    parser = ArgumentParser()
    add_arguments(parser)
    for k, given in enumerate(([], ["--share", "--host", "0.0.0.0", "--port", "81", "--auth", "ann:se:cret"])):
        (tmp_path / str(k)).mkdir()
        serve(parser.parse_args(given), tmp_path / str(k)).worker.close()
    usual, wide = ([each[k] for k in ("server_name", "server_port", "share", "auth")] for each in launched)
    assert usual == ["127.0.0.1", 7860, False, None]
    assert wide == ["0.0.0.0", 81, True, ("ann", "se:cret")]
    assert all(each["enable_monitoring"] is False for each in launched)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--port", "99999"], "--port 99999: needs a number from 0 to 65535"),
        (["--auth", "ann"], "--auth: needs a name and a password, as USER:PASSWORD"),
        (["--base", "no/such/folder"], "no/such/folder"),
    ],
)
def test_flags_that_cannot_be_used_are_said(given, message, capsys):
    assert main(["demo", *given]) == 1
    assert message in capsys.readouterr().err


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
    said, _, gallery = client.predict("scene-map", start[1], sent, 1.0, 5, STEPS, 5.0, 64, 64, api_name="/control")
    base, steered = (each["image"] for each in gallery)
    settings, control = read_image(steered)
    assert "Done" in said and settings.seed == 5 and read_image(base)[1] is None
    *_, last = server.worker.submit(settings, "test", control=control).events()
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


def test_a_cut_is_the_square_that_was_asked_for():
    image = Image.fromarray(np.arange(60 * 100, dtype=np.int32).reshape(60, 100))
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(cut_square(image)), pixels[:, 20:80])
    assert np.array_equal(np.asarray(cut_square(image, 50, 0, 100)), pixels[30:, :30])
    assert np.array_equal(np.asarray(cut_square(image, 50, 250, -3)), pixels[:30, 70:])
    assert cut_square(image, 0).size == (1, 1)


def test_a_large_photo_keeps_its_detail_when_it_is_cut(client, photographs, tmp_path):
    Image.new("RGB", (3000, 2000)).save(tmp_path / "large.png")
    photos = [gradio_client.handle_file(tmp_path / "large.png")]
    for size, expected in ((100, 1024), (20, 400)):
        (file,), *_ = client.predict(photos, 0, size, 50, 50, api_name="/crop")
        assert Image.open(file).size == (expected, expected)


def test_a_broken_upload_is_explained_and_a_sound_one_described(client, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    said, report = client.predict(gradio_client.handle_file(tmp_path / "bad.safetensors"), api_name="/check_file")
    assert "bad.safetensors holds a pickle" in said and str(tmp_path) not in said and report == ""
    sound = SHIPPED / "toy-1" / "pytorch_ether_weights.safetensors"
    said, report = client.predict(gradio_client.handle_file(sound), api_name="/check_file")
    assert "fits" in said and "ETHER+" in report and "19,968" in report and "°" in report


@pytest.mark.parametrize("to", ["ether", "diffusers-lora", "kohya"])
def test_an_adapter_can_be_taken_along(client, to):
    said, file = client.predict("toy-1", to, api_name="/export")
    assert "toy-1" in said and Path(file).stat().st_size > 10_000
    if to != "kohya":
        pipe = miniature.load_pipeline()
        pipe.load_ether_weights(file) if to == "ether" else pipe.load_lora_weights(file)


def test_a_training_that_cannot_start_is_explained(client, photographs, tmp_path):
    photos = [gradio_client.handle_file(path) for path in sorted(photographs.iterdir())]
    for photos_given, name, word, message in (
        (photos[:2], "dog", "dog", "Photos: got 2, needs 3 to 8"),
        (photos, "///", "dog", "Name: got '///', needs letters or digits"),
        (photos, "dog", "<b>", "Subject: got '<b>', needs a word"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(photos_given, name, word, "ether", api_name="/train")


@pytest.mark.slow
def test_photos_become_an_adapter_that_generates(server, client, photographs):
    photos = [gradio_client.handle_file(path) for path in sorted(photographs.iterdir())]
    job = client.submit(photos, "my toy", "toy", "ether_plus", api_name="/train")
    said, chart, sample = job.result()
    assert "my-toy is in the list" in said and "Loss" in chart and Image.open(sample).size[0] > 100
    assert any("left" in each[0] for each in job.outputs())
    client.predict(api_name="/refresh")
    with Image.open(server.worker.library.get("my-toy").image) as picture:
        assert picture.size == (64, 64)  # the subject alone, not the sheet of samples
    answer = ask(client, ("my-toy", 1.0)).result()
    assert not np.array_equal(*pictures(answer))


@pytest.mark.slow
def test_a_training_stops_when_told_to(server, client, photographs):
    photos = [gradio_client.handle_file(path) for path in sorted(photographs.iterdir())]
    job = client.submit(photos, "stopped", "toy", "ether", api_name="/train")
    wait_until(lambda: any("left" in each[0] for each in job.outputs()))
    client.predict(api_name="/stop_training")
    assert "Stopped" in job.result()[0]
    assert "stopped" not in [each.name for each in server.worker.library.adapters()]


def test_ether_is_known_to_every_thread(worker):
    """The worker generates in a thread of its own, in which nothing was imported."""
    found = []
    thread = threading.Thread(target=lambda: found.append(hasattr(worker.pipe, "load_ether_weights")))
    thread.start()
    thread.join()
    assert found == [True] and ether_diffusion.__version__
