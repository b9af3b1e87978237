"""The worker alone: what it generates, tells and refuses."""

import inspect
import shutil
import threading

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from helpers import flow_zoo
from helpers.demo import PROMPT, STEPS, count_steps, generate
from PIL import Image

import ether_diffusion
from ether_diffusion import miniature
from ether_diffusion.commands.demo import SHIPPED
from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating
from ether_diffusion.demo.library import Library
from ether_diffusion.demo.settings import Settings, read_image
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError


def test_shipped_adapters_fit_and_change_the_image(worker):
    offered = [each for each in worker.library.adapters() if (SHIPPED / each.name).is_dir()]
    shipped = [each for each in offered if not each.is_control]
    assert len(shipped) == 3
    for adapter in shipped:
        assert worker.fit(adapter) == "fits" and adapter.image is not None and "a photo of" in adapter.prompt
        ((base, adapted),) = generate(worker, adapters=((adapter.name, 1.0),)).images
        assert np.asarray(base).tolist() != np.asarray(adapted).tolist()


@pytest.fixture(scope="module")
def alone(adapters):
    """A worker that joins no images."""
    worker = Worker(miniature.FOLDER, Library(adapters), device="cpu", max_batch=1)
    yield worker
    worker.close()


def difference(image, other) -> int:
    """The largest, in grey levels."""
    return np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).max()


def test_strength_zero_is_the_base_and_a_seed_repeats(worker, alone):
    stock = miniature.load_pipeline()
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = np.asarray(stock(PROMPT, num_inference_steps=STEPS, guidance_scale=5.0, generator=generator).images[0])
    for each, rounding in ((alone, 0), (worker, 1)):  # a batch rounds as its shape has it
        for strength in (1.0, 0.0):
            adapters = (("toy-1", strength), ("house-1", strength))
            ((base, adapted),) = generate(each, seed=5, adapters=adapters).images
            assert difference(base, expected) <= rounding
            assert (difference(adapted, base) == 0) == (strength == 0.0)
            ((again, _),) = generate(each, seed=5, adapters=adapters).images
            assert difference(base, again) == 0


def test_images_of_one_request_share_their_forwards_and_have_consecutive_seeds(worker, alone):
    adapters = (("toy-1", 1.0), ("face-1", 0.5))
    joined = generate(worker, adapters=adapters, seed=3, images=2).images
    assert worker.engine.counts.largest == 8  # two images, base and adapted, each with guidance
    for k, pair in enumerate(joined):
        (expected,) = generate(alone, adapters=adapters, seed=3 + k).images
        assert all(difference(image, other) <= 1 for image, other in zip(pair, expected, strict=True))


def test_adapters_are_those_of_all_folders_as_they_are_now(alone, adapters, tmp_path):
    shutil.copytree(adapters / "toy-1", tmp_path / "own")
    worker = Worker(miniature.FOLDER, Library(SHIPPED, tmp_path), device="cpu", max_batch=1)
    try:
        for name in ("toy-1", "house-1"):  # the file of a name is another one from now on
            shutil.copytree(adapters / name, tmp_path / "own", dirs_exist_ok=True)
            ((_, expected),) = generate(alone, adapters=((name, 1.0),)).images
            ((_, shipped), (_, own)) = (generate(worker, adapters=((each, 1.0),)).images[0] for each in (name, "own"))
            assert difference(own, expected) == difference(shipped, expected) == 0
        shutil.rmtree(tmp_path / "own")
        with pytest.raises(InputError, match="there is no adapter 'own'; on offer are face-1, house-1"):
            generate(worker, adapters=(("own", 1.0),))
    finally:
        worker.close()


def test_a_transformer_with_its_own_sizes_and_guidance_is_served(tmp_path):
    flow_zoo.make("sd3", tmp_path / "files").save_pretrained(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    worker = Worker(tmp_path / "base", Library(tmp_path / "adapters"), device="cpu", max_batch=4)
    try:
        assert (worker.side, worker.unit, worker.guidance) == (16, 4, 7.0)
        news = list(worker.generate(Settings(prompt="a dog", steps=3, width=20, height=16, negative_prompt="a cat")))
        ((base,),) = news[-1].images
        assert base.size == (20, 16)
        with pytest.raises(InputError, match="Width: got 18, needs a multiple of 4 from 8 to 32"):
            list(worker.generate(Settings(prompt="a dog", width=18, height=16)))
    finally:
        worker.close()


def test_a_crash_is_told_and_the_next_request_is_served(worker, monkeypatch, caplog):
    before = generate(worker, adapters=(("toy-1", 1.0),))
    stock = type(worker.pipe).__call__

    def fails(self, prompt, **arguments):
        if prompt == "crash":
            raise RuntimeError("a wire is loose")
        if prompt == "fill the memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 TB")
        return stock(self, prompt, **arguments)

    fails.__signature__ = inspect.signature(stock)
    monkeypatch.setattr(type(worker.pipe), "__call__", fails)
    with pytest.raises(Failed, match="a wire is loose.*starts afresh"):
        generate(worker, prompt="crash", adapters=(("house-1", 1.0),))
    with pytest.raises(Failed, match="not enough memory for an image of 64×64 pixels. A smaller"):
        generate(worker, prompt="fill the memory")
    after = generate(worker, adapters=(("toy-1", 1.0),))
    assert np.array_equal(np.asarray(before.images[0][1]), np.asarray(after.images[0][1]))


def test_news_say_the_step_and_show_a_preview(worker):
    news = list(worker.generate(Settings(prompt=PROMPT, steps=8)))
    steps = [each for each in news if isinstance(each, Generating)]
    assert [each.step for each in steps] == sorted({each.step for each in steps}) and steps[-1].steps == 8
    assert any(each.preview is not None for each in steps)
    assert isinstance(news[-1], Generated)


def test_news_of_images_that_run_together_are_of_the_first_and_the_share_of_all(worker):
    *news, last = worker.generate(Settings(prompt=PROMPT, steps=4, images=2, adapters=(("toy-1", 1.0),)))
    assert [each.images for each in news] == [4] * len(news) and len(last.images) == 2
    places = [(each.image, each.step, each.done) for each in news]
    assert places == sorted(places) and 0 < places[0][-1] and places[-1][-1] <= 1


def test_news_of_a_scheduler_that_takes_more_steps_count_those_that_were_asked_for(worker, monkeypatch):
    heun = HeunDiscreteScheduler.from_config(worker.pipe.scheduler.config)
    monkeypatch.setattr(worker.pipe, "scheduler", heun)  # 7 steps for 4
    *news, _ = worker.generate(Settings(prompt=PROMPT, steps=4))
    assert {each.steps for each in news} == {4} and max(each.step for each in news) <= 4


def test_closing_the_news_cancels(worker, monkeypatch):
    taken = count_steps(worker, monkeypatch)
    news = worker.generate(Settings(prompt=PROMPT, steps=150, images=4))
    next(news)
    news.close()
    generate(worker)  # comes after whatever is left of the other
    assert len(taken) < 150


def test_closing_the_worker_cancels(adapters):
    worker = Worker(miniature.FOLDER, Library(adapters), device="cpu")
    news = worker.generate(Settings(prompt=PROMPT, steps=150, images=4))
    next(news)
    worker.close()
    with pytest.raises(Cancelled):
        list(news)


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
def test_what_cannot_be_generated_is_refused(worker, settings, message):
    with pytest.raises(InputError, match=message):
        generate(worker, **settings)


def test_a_control_adapter_steers_with_its_map_and_leaves_no_trace(worker):
    board = Image.fromarray(np.kron(np.eye(8, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8)))
    plain = generate(worker).images[0][0]
    ((base, steered),) = generate(worker, adapters=(("map", 1.0),), control=board).images
    assert not np.array_equal(np.asarray(base), np.asarray(steered))
    assert np.array_equal(np.asarray(generate(worker).images[0][0]), np.asarray(plain))


def test_the_shipped_control_adapter_comes_with_the_map_of_its_image(worker):
    (adapter,) = (each for each in Library(SHIPPED).adapters() if each.is_control)
    settings, control = read_image(adapter.image)
    *_, last = worker.generate(settings, control=control)
    ((base, steered),) = last.images
    with Image.open(adapter.image) as shown:
        expected = np.asarray(shown.convert("RGB"), np.float32)
    # Processors round differently; another image differs by much more.
    assert np.abs(np.asarray(steered, np.float32) - expected).mean() < 4
    assert np.abs(np.asarray(base, np.float32) - expected).mean() > 8


def test_ether_is_known_to_every_thread(worker):
    """The worker generates in a thread of its own, in which nothing was imported."""
    found = []
    thread = threading.Thread(target=lambda: found.append(hasattr(worker.pipe, "load_ether_weights")))
    thread.start()
    thread.join()
    assert found == [True] and ether_diffusion.__version__
