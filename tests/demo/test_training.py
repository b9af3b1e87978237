"""Training from the page: in line, in a process of its own, up to an adapter that generates."""

import contextlib
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from helpers.demo import ask, connect, images_of, told, uploaded
from helpers.scripts import wait_until
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion.demo.training import Choices, Trainer, _Training
from ether_diffusion.errors import InputError


def scripts() -> list[psutil.Process]:
    """The training scripts that this process has started and that still run."""
    found = []
    for each in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while one looks
            if each.status() != psutil.STATUS_ZOMBIE and "ether_diffusion.training.dreambooth" in each.cmdline():
                found.append(each)
    return found


@pytest.fixture
def train(worker, photographs):
    """train(**instead of the usual) -> the news of a training of the worker's."""
    trainer, photos = Trainer(worker), sorted(photographs.iterdir())

    def call(**given: object):
        usual = {"photos": photos, "name": "toy", "word": "toy", "method": "ether", "steps": 2}
        return trainer.train(Choices(**usual | given))()

    yield call
    trainer.close()


def test_a_training_that_is_given_up_ends_before_the_next_begins(train):
    first, second = train(steps=200), train(steps=200)
    wait_until(lambda: next(first) and scripts())
    (process,) = scripts()
    first.close()
    wait_until(lambda: next(second) and process not in (running := scripts()) and running)
    assert len(scripts()) == 1  # two would share the memory
    second.close()
    wait_until(lambda: not scripts())


def test_what_the_script_refuses_is_told_in_its_words(worker, photographs, tmp_path):
    version = {"variant": "fp16", "revision": "main"}  # both are flags of the script
    no_pipeline = SimpleNamespace(
        base=str(tmp_path), version=version, device="cpu", side=64, guidance=5.0, library=worker.library
    )
    trainer = Trainer(no_pipeline)
    with pytest.raises(InputError, match="model_index.json"):
        list(trainer.train(Choices(sorted(photographs.iterdir()), "toy", "toy"))())
    trainer.close()


def start(client, photographs, name: str, steps: int = 200, **others: object):
    given = {"word": "toy", "captions": "", "method": "ether", "rate": None} | others
    photos = others.get("photos", uploaded(photographs))
    return client.submit(
        photos, name, given["word"], given["captions"], given["method"], steps, given["rate"], api_name="/train"
    )


def test_trainings_of_two_clients_run_one_after_the_other(server, photographs):
    clients = [connect(server) for _ in range(2)]
    first = start(clients[0], photographs, "first")
    wait_until(lambda: scripts())
    second = start(clients[1], photographs, "second")
    wait_until(lambda: "In line: 1 job is before yours." in told(second))
    for client, job in zip(clients, (first, second), strict=True):
        client.predict(job.outputs()[-1][1], api_name="/cancel_train")
    assert "Cancelled." in second.result()[0]
    wait_until(lambda: not scripts())
    assert not {"first", "second"} & {each.name for each in server.worker.library.adapters()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2}, "Photos: got 2, needs 3 to 8"),
        ({"name": "a/b"}, "Name: got 'a/b', which has /"),
        ({"word": "<b>"}, "Subject: got '<b>', needs a word"),
        ({"steps": 0}, "Steps|0"),
        ({"rate": -1.0}, "Learning rate|-1"),
    ],
)
def test_a_training_that_cannot_start_is_explained(client, photographs, given, message):
    photos = uploaded(photographs)[: given.pop("count", 8)]
    with pytest.raises(Exception, match=message):
        start(client, photographs, **{"name": "dog", "photos": photos} | given).result()


def test_captions_reach_the_script_and_an_empty_line_takes_the_prompt(train, monkeypatch):
    written = {}
    run = _Training._run_script

    def look(self, photos, out):
        written.update({path.name: path.read_text("utf-8") for path in photos.glob("*.txt")})
        return run(self, photos, out)

    monkeypatch.setattr(_Training, "_run_script", look)
    *_, last = train(word="perro pequeño", captions=["a toy on the moon", "", " "])
    assert written == {"0.txt": "a toy on the moon"}
    assert last.name.startswith("toy") and last.sheets.keys() == {1, 2}


def test_an_earlier_step_is_kept_by_its_owner_alone(worker, photographs, tmp_path):
    trainer = Trainer(worker)
    try:
        photos = sorted(photographs.iterdir())
        *_, last = trainer.train(Choices(photos, "kept", "toy", steps=4), "me")()
        file = worker.library.get(last.name).path
        after = load_file(file)
        with pytest.raises(InputError, match="no step 2 of an adapter kept of yours"):
            trainer.keep(last.name, 2, "you")
        with pytest.raises(InputError, match="no step 9"):
            trainer.keep(last.name, 9, "me")
        trainer.keep(last.name, 2, "me")
        before = load_file(file)
        assert before.keys() == after.keys() and not all(torch.equal(before[key], after[key]) for key in after)
        trainer.keep(last.name, 4, "me")
        assert all(torch.equal(tensor, after[key]) for key, tensor in load_file(file).items())
        assert worker.fit(worker.library.get(last.name)) == "fits"
    finally:
        trainer.close()


def shown_file(value) -> str:
    """The file of an image that an update shows."""
    value = value["value"] if isinstance(value, dict) and "value" in value else value
    return value["path"] if isinstance(value, dict) else value


@pytest.mark.slow
def test_photos_become_an_adapter_that_generates(server, client, photographs):
    job = start(client, photographs, "my toy", method="ether_plus")
    said, _, _, sample, keep = job.result()
    assert "my toy is in the list" in said and Image.open(shown_file(sample)).size[0] > 100
    assert [step for _, step in keep["choices"]] == [50, 100, 150, 200] and keep["value"] == 200
    assert any("left" in each[0] for each in job.outputs())
    client.predict("", api_name="/refresh")
    with Image.open(server.worker.library.get("my toy").image) as image:
        assert image.size == (64, 64)  # the subject alone, not the sheet of samples
    answer = ask(client, ("my toy", 1.0)).result()
    assert not np.array_equal(*images_of(answer))


@pytest.mark.slow
def test_a_training_stops_when_told_to(server, client, photographs):
    job = start(client, photographs, "stopped")
    wait_until(lambda: "left" in told(job))
    client.predict(job.outputs()[-1][1], api_name="/cancel_train")
    assert "Cancelled." in job.result()[0]
    wait_until(lambda: not scripts())
    assert "stopped" not in [each.name for each in server.worker.library.adapters()]
