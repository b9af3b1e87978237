"""Every request has its own adapters, as their files were when it was submitted, whatever happens around it."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from helpers import flow_zoo
from helpers.lora import ATTENTION, save_adapter
from helpers.pipelines import ONE_GREY_LEVEL, open_pipeline
from helpers.serving import NAMES, SCHEDULERS, TARGETS, WAIT, Alone, Asked, distance, save_adapters
from helpers.zoo import save_control
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ether_diffusion import EtherControlPipeline, EtherFileError
from ether_diffusion.errors import InputError
from ether_diffusion.export.lora import export_lora
from ether_diffusion.serving import Cancelled, Engine, EngineFull, UnknownAdapter


@pytest.fixture(scope="module")
def adapters_once(tmp_path_factory, tiny_pipeline_folder):
    return save_adapters(tmp_path_factory.mktemp("adapters"), tiny_pipeline_folder)


@pytest.fixture
def adapters(adapters_once, tmp_path):
    return shutil.copytree(adapters_once, tmp_path / "adapters")


@pytest.fixture(scope="module")
def alone(tiny_pipeline_folder, adapters_once):
    return Alone(open_pipeline(tiny_pipeline_folder), adapters_once)


@pytest.fixture
def engine(tiny_pipeline, adapters):
    with Engine(tiny_pipeline, adapters, max_batch=16) as engine:
        yield engine


def with_adapter(name, strength=1.0, **options) -> Asked:
    return Asked(adapter=((name, strength),), **options)


def test_one_prompt_and_seed_with_many_adapters_at_once_are_each_their_own_image(engine, alone):
    asked = [Asked(), *(with_adapter(name) for name in NAMES), with_adapter("dog", 0.5), with_adapter("cat", -1.0)]
    for name in NAMES:
        engine.store.get(name)  # so that nobody waits for a file while the first are generated
    jobs = [each.submit(engine) for each in asked]
    references = [alone.images(each) for each in asked]
    for k, job in enumerate(jobs):
        images = job.result(WAIT).images
        assert distance(job, references[k]) <= ONE_GREY_LEVEL
        assert int(np.argmin([np.abs(images - each).max() for each in references])) == k
    assert engine.counts.largest > 8


def test_several_adapters_of_one_request_compose_in_their_order(engine, alone):
    asked = [
        Asked(adapter=(("dog", 1.0), ("cat", 0.6))),
        Asked(adapter=(("cat", 0.6), ("dog", 1.0))),
    ]
    for job, each in [(each.submit(engine), each) for each in asked]:
        assert distance(job, alone.images(each)) <= ONE_GREY_LEVEL


def test_a_name_alone_is_the_adapter_at_full_strength(engine, alone):
    options = with_adapter("dog").arguments()
    assert distance(engine.submit(adapter="dog", seed=0, **options), alone.images(with_adapter("dog"))) <= (
        ONE_GREY_LEVEL
    )


def test_an_adapter_that_is_replaced_while_its_request_runs_is_the_old_one_for_it(
    engine, alone, adapters, tiny_pipeline_folder, tmp_path
):
    changed = threading.Event()

    def replace(job):
        if not changed.is_set():
            os.replace(adapters / "cat.safetensors", adapters / "dog.safetensors")
            changed.set()

    running = with_adapter("dog", steps=4).submit(engine, on_step=replace)
    assert changed.wait(WAIT)
    after = engine.submit(adapter="dog", seed=0, **with_adapter("cat", steps=4).arguments())
    assert distance(running, alone.images(with_adapter("dog", steps=4))) <= ONE_GREY_LEVEL
    assert distance(after, alone.images(with_adapter("cat", steps=4))) <= ONE_GREY_LEVEL
    with pytest.raises(UnknownAdapter):
        engine.submit(prompt="a dog", adapter="cat")


def test_an_adapter_that_is_deleted_while_its_request_waits_is_still_there_for_it(engine, alone, adapters):
    deleted = []

    def delete(job):
        if not deleted:
            deleted.append(with_adapter("dog").submit(engine))
            (adapters / "dog.safetensors").unlink()

    Asked().submit(engine, on_step=delete).result(WAIT)
    assert distance(deleted[0], alone.images(with_adapter("dog"))) <= ONE_GREY_LEVEL
    with pytest.raises(UnknownAdapter, match="'dog'"):
        engine.submit(prompt="a dog", adapter="dog")


def test_an_adapter_that_is_evicted_is_read_again(tiny_pipeline, adapters, alone):
    with Engine(tiny_pipeline, adapters, max_batch=16, host_bytes=1) as engine:
        jobs = [(with_adapter(name).submit(engine), name) for name in ("dog", "cat", "dog")]
        for job, name in jobs:
            assert distance(job, alone.images(with_adapter(name))) <= ONE_GREY_LEVEL
        assert engine.store.loads == 3 and engine.store.nbytes == 0


def test_an_adapter_in_memory_is_not_read_again(engine):
    jobs = [with_adapter("dog").submit(engine) for _ in range(3)]
    assert all(job.result(WAIT).images.shape for job in jobs)
    assert engine.store.loads == 1


def test_unknown_broken_and_unfitting_adapters_are_refused_before_anything_waits(
    engine, adapters, wider_pipeline_folder, tmp_path
):
    (adapters / "broken.safetensors").write_bytes(b"no adapter")
    made = save_adapter(tmp_path, wider_pipeline_folder, "wide", TARGETS, 1)
    shutil.copytree(made, adapters / "wide")
    with pytest.raises(UnknownAdapter, match="'dgo'; near it: dog"):
        engine.submit(prompt="a dog", adapter="dgo")
    for name in ("broken", "wide"):
        with pytest.raises(EtherFileError):
            engine.submit(prompt="a dog", adapter=name)
    for name in ("../adapters/dog", "..", ".", "", "/", "a\0b"):
        with pytest.raises(UnknownAdapter):
            engine.submit(prompt="a dog", adapter=name)
    assert engine.waiting == engine.running == 0


def test_more_requests_with_adapters_than_rows_wait_for_a_free_one(tiny_pipeline, adapters, alone):
    asked = [with_adapter(NAMES[k % 4], seed=k, guidance=1.0) for k in range(9)]
    with Engine(tiny_pipeline, adapters, max_batch=2) as engine:
        jobs = [each.submit(engine) for each in asked]
        jobs[3].cancel()
        for k, (job, each) in enumerate(zip(jobs, asked, strict=True)):
            if k != 3:
                assert distance(job, alone.images(each)) <= ONE_GREY_LEVEL


def test_the_pipeline_has_no_adapter_when_the_engine_is_closed(tiny_pipeline, adapters, alone):
    with Engine(tiny_pipeline, adapters, max_batch=2) as engine:
        with_adapter("dog").submit(engine)
    again = Alone(tiny_pipeline, adapters)
    assert np.array_equal(again.images(Asked()), alone.images(Asked()))
    assert np.abs(again.images(with_adapter("dog")) - alone.images(with_adapter("dog"))).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "krea2"])
def test_transformers_have_an_adapter_for_each_row(name, tmp_path):
    pipe = flow_zoo.make(name, tmp_path / "pipe")
    pipe.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save_adapter(tmp_path / "adapters", tmp_path / "base", f"a{seed}", {"transformer": ATTENTION}, seed)
    options = {"prompt": "a dog", "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}

    def stock(adapter):
        if adapter:
            pipe.load_ether_weights(tmp_path / "adapters" / adapter)
        try:
            return pipe(**options, generator=torch.Generator().manual_seed(0)).images
        finally:
            pipe.unload_ether_weights()

    chosen = ["a1", None, "a2"]
    expected = [stock(adapter) for adapter in chosen]
    with Engine(pipe, tmp_path / "adapters", max_batch=8) as engine:
        jobs = [engine.submit(adapter=adapter, seed=0, **options) for adapter in chosen]
        assert max(map(distance, jobs, expected)) <= ONE_GREY_LEVEL
    assert np.abs(expected[0] - expected[2]).max() > ONE_GREY_LEVEL


# Control ------------------------------------------------------------------------------------------------------------


def test_a_control_image_runs_alone_with_its_adapter_and_the_others_go_on(
    engine, alone, adapters, tiny_pipeline_folder
):
    save_control("light", tiny_pipeline_folder, adapters / "edges")
    image = Image.new("RGB", (16, 16), "white")
    options = Asked().arguments()
    stock = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    stock.load_ether_weights(adapters / "edges")
    expected = stock(control_image=image, **options, generator=torch.Generator().manual_seed(0)).images
    before = [Asked(steps=4).submit(engine), with_adapter("dog", steps=4).submit(engine)]
    steps = []
    job = engine.submit(
        adapter="edges", control_image=image, seed=0, on_step=lambda job: steps.append(job.progress.step), **options
    )
    after = with_adapter("cat").submit(engine)
    assert distance(job, expected) <= ONE_GREY_LEVEL and steps == [1, 2]
    assert distance(before[0], alone.images(Asked(steps=4))) <= ONE_GREY_LEVEL
    assert distance(before[1], alone.images(with_adapter("dog", steps=4))) <= ONE_GREY_LEVEL
    assert distance(after, alone.images(with_adapter("cat"))) <= ONE_GREY_LEVEL
    assert engine.pipe.ether_adapters == {}


def test_a_request_that_runs_alone_is_cancelled_and_fails_like_others(engine, adapters, tiny_pipeline_folder, alone):
    save_control("light", tiny_pipeline_folder, adapters / "edges")
    image = Image.new("RGB", (16, 16), "white")
    cancelled = engine.submit(
        prompt="a dog", adapter="edges", control_image=image, num_inference_steps=900, on_step=lambda job: job.cancel()
    )
    failed = engine.submit(prompt="a dog", adapter="dog", control_image=image)
    with pytest.raises(Cancelled):
        cancelled.result(WAIT)
    with pytest.raises(ValueError, match="holds no control encoder"):
        failed.result(WAIT)
    assert distance(with_adapter("dog").submit(engine), alone.images(with_adapter("dog"))) <= ONE_GREY_LEVEL


def test_a_control_adapter_without_its_image_is_refused(engine, adapters, tiny_pipeline_folder):
    save_control("light", tiny_pipeline_folder, adapters / "edges")
    with pytest.raises((InputError, EtherFileError)):
        engine.submit(prompt="a dog", adapter="edges")


def test_what_needs_the_pipeline_itself_is_called_with_nothing_beside_it(engine, alone, adapters, tmp_path):
    def export(pipe):
        assert engine.running == 1
        pipe.load_ether_weights(adapters / "dog.safetensors", "dog")
        try:
            return export_lora(pipe, tmp_path / "lora", to="diffusers-lora").path
        finally:
            pipe.unload_ether_weights()

    jobs = with_adapter("dog").submit(engine), engine.call_alone(export), with_adapter("dog").submit(engine)
    assert jobs[1].result(WAIT).is_file()
    for job in (jobs[0], jobs[2]):
        assert distance(job, alone.images(with_adapter("dog"))) <= ONE_GREY_LEVEL


def test_what_is_called_alone_has_the_adapter_that_it_asks_for(engine, tmp_path):
    def export(pipe):
        return export_lora(pipe, tmp_path / "lora", to="diffusers-lora").path

    assert engine.call_alone(export, adapter="dog").result(WAIT).is_file()
    assert engine.call_alone(lambda pipe: dict(pipe.ether_adapters)).result(WAIT) == {}
    with pytest.raises(UnknownAdapter):
        engine.call_alone(export, adapter="dgo")


def test_adapters_may_lie_wherever_a_catalogue_says(tiny_pipeline, adapters, alone):
    class Renamed:
        def names(self):
            return ["hound"]

        def find(self, name):
            if name != "hound":
                raise InputError(f"no {name}")
            return adapters / "dog.safetensors"

    with Engine(tiny_pipeline, Renamed(), max_batch=4) as engine:
        assert engine.store.names() == ["hound"]
        job = with_adapter("hound").submit(engine)
        assert distance(job, alone.images(with_adapter("dog"))) <= ONE_GREY_LEVEL
        with pytest.raises(InputError, match="no dog"):
            with_adapter("dog").submit(engine)


# Whatever happens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_engine(tiny_pipeline_folder, adapters_once):
    with Engine(open_pipeline(tiny_pipeline_folder), adapters_once, max_batch=6) as engine:
        yield engine


requests = st.builds(
    Asked,
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    steps=st.integers(1, 3),
    guidance=st.sampled_from([1.0, 5.0]),
    adapter=st.sampled_from([(), (("dog", 1.0),), (("cat", 1.0),), (("dog", 0.5),), (("🐕", 1.0),)]),
)


@given(plan=st.lists(st.tuples(requests, st.sampled_from([None, None, 0, 1])), min_size=1, max_size=7))
@settings(max_examples=20, deadline=None)
def test_whatever_leaves_beside_it_every_request_has_its_own_subject(shared_engine, alone, plan):
    jobs = []
    for asked, cancelled_at in plan:
        stop = lambda job, at=cancelled_at: job.cancel() if job.progress.step == at else None  # noqa: E731
        jobs.append(asked.submit(shared_engine, on_step=stop))
        if cancelled_at == 0:
            jobs[-1].cancel()
    for job, (asked, cancelled_at) in zip(jobs, plan, strict=True):
        if cancelled_at is None:
            assert distance(job, alone.images(asked)) <= ONE_GREY_LEVEL
        else:
            assert job.future.exception(WAIT) is None or isinstance(job.future.exception(), Cancelled)


@pytest.mark.slow
def test_forty_clients_with_a_thousand_adapters_lose_nothing_and_never_get_another_subject(
    tiny_pipeline, adapters, alone, tmp_path
):
    many = tmp_path / "many"
    many.mkdir()
    for k in range(1000):
        os.link(adapters / f"{NAMES[k % 4]}.safetensors", many / f"{k}.safetensors")
    references = [alone.images(with_adapter(name, guidance=1.0)) for name in NAMES]
    wrong, counts = [], {"right": 0, "full": 0, "cancelled": 0}

    def client(number):
        random = np.random.default_rng(number)
        for _ in range(5):
            k = int(random.integers(1000))
            arguments = with_adapter(NAMES[k % 4], guidance=1.0).arguments()
            while True:
                try:
                    job = engine.submit(adapter=str(k), seed=0, client=str(number), **arguments)
                    break
                except EngineFull:
                    counts["full"] += 1
                    time.sleep(0.05)
            if random.random() < 0.15:
                job.cancel()
            try:
                images = job.result(WAIT).images
            except Cancelled:
                counts["cancelled"] += 1
                continue
            far = [np.abs(images - each).max() for each in references]
            if int(np.argmin(far)) != k % 4 or min(far) > ONE_GREY_LEVEL:
                wrong.append((k, far))
            counts["right"] += 1

    nbytes = 0
    with Engine(tiny_pipeline, many, max_batch=8, max_line=16) as engine:
        nbytes = engine.store.get("0").nbytes
    with Engine(tiny_pipeline, many, max_batch=8, max_line=16, host_bytes=50 * nbytes) as engine:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(40)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        assert engine.store.nbytes <= 50 * nbytes
    assert not wrong and counts["right"] + counts["cancelled"] == 200
