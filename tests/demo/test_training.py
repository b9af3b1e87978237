"""Training from the page: in line, in a process of its own, up to an adapter that generates."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from gradio_client.utils import Status
from helpers.demo import ask, connect, images_of, uploaded
from helpers.scripts import wait_until
from PIL import Image

from ether_diffusion.demo.training import Trainer
from ether_diffusion.errors import InputError


def scripts() -> list[psutil.Process]:
    """The training scripts that this process has started and that still run."""
    running = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in running if "ether_diffusion.training.dreambooth" in each.cmdline()]


@pytest.fixture
def train(worker, photographs):
    """train(**instead of the usual) -> the news of a training of the worker's."""
    trainer, photos = Trainer(worker), sorted(photographs.iterdir())

    def call(**given: object):
        return trainer.train(photos, **{"name": "toy", "word": "toy", "method": "ether", "steps": 2} | given)

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
        list(trainer.train(sorted(photographs.iterdir()), name="toy", word="toy", method="ether"))
    trainer.close()


def test_trainings_of_two_clients_run_one_after_the_other(server, photographs):
    first, second = (
        connect(server).submit(uploaded(photographs), name, "toy", "ether", api_name="/train")
        for name in ("first", "second")
    )
    wait_until(first.outputs)
    wait_until(lambda: second.status().code is Status.IN_QUEUE and second.status().rank == 0)
    first.cancel()
    wait_until(second.outputs)
    second.cancel()
    wait_until(lambda: not scripts())
    assert not {"first", "second"} & {each.name for each in server.worker.library.adapters()}


def test_a_training_that_cannot_start_is_explained(client, photographs, tmp_path):
    photos = uploaded(photographs)
    for photos_given, name, word, message in (
        (photos[:2], "dog", "dog", "Photos: got 2, needs 3 to 8"),
        (photos, "///", "dog", "Name: got '///', needs letters or digits"),
        (photos, "dog", "<b>", "Subject: got '<b>', needs a word"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(photos_given, name, word, "ether", api_name="/train")


@pytest.mark.slow
def test_photos_become_an_adapter_that_generates(server, client, photographs):
    photos = uploaded(photographs)
    job = client.submit(photos, "my toy", "toy", "ether_plus", api_name="/train")
    told, chart, sample = job.result()
    assert "my-toy is in the list" in told and Image.open(sample).size[0] > 100
    assert len(chart["value"]["data"]) == 200
    assert any("left" in each[0] for each in job.outputs())
    client.predict(api_name="/refresh")
    with Image.open(server.worker.library.get("my-toy").image) as image:
        assert image.size == (64, 64)  # the subject alone, not the sheet of samples
    answer = ask(client, ("my-toy", 1.0)).result()
    assert not np.array_equal(*images_of(answer))


@pytest.mark.slow
def test_a_training_stops_when_told_to(server, client, photographs):
    photos = uploaded(photographs)
    job = client.submit(photos, "stopped", "toy", "ether", api_name="/train")
    wait_until(lambda: any("left" in each[0] for each in job.outputs()))
    job.cancel()
    wait_until(lambda: not scripts())
    assert "stopped" not in [each.name for each in server.worker.library.adapters()]
