"""Cancelling, deadlines, progress, and a job in other hands."""

import asyncio
import concurrent.futures
import time

import pytest
from helpers.pipelines import ONE_GREY_LEVEL, open_pipeline
from helpers.serving import WAIT, Alone, Asked, distance

from ether_diffusion.serving import Cancelled, DeadlineExceeded, Engine

LONG = {"prompt": "a dog", "num_inference_steps": 900}


@pytest.fixture
def engine(tiny_pipeline):
    with Engine(tiny_pipeline, max_batch=2) as engine:
        yield engine
        engine.close(drain=False)


def wait_for(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_cancelled_request_ends_at_its_next_step_and_its_rows_are_free(engine, tiny_pipeline_folder):
    running = engine.submit(**LONG)
    wait_for(lambda: running.progress.step > 2)
    running.cancel()
    with pytest.raises(Cancelled):
        running.result(WAIT)
    assert running.progress.step < 900
    stock = Alone(open_pipeline(tiny_pipeline_folder))
    assert distance(Asked().submit(engine), stock.images(Asked())) <= ONE_GREY_LEVEL
    wait_for(lambda: engine.running == 0)


def test_a_waiting_request_is_cancelled_at_once(engine):
    engine.submit(**LONG)
    wait_for(lambda: engine.running)
    waiting = engine.submit(**LONG)
    waiting.cancel()
    assert waiting.done and engine.waiting == 0
    with pytest.raises(Cancelled):
        waiting.result()
    assert waiting.times["started"] is None


def test_a_finished_request_cannot_be_cancelled(engine):
    job = Asked().submit(engine)
    images = job.result(WAIT).images
    job.cancel()
    assert job.result().images is images


def test_a_deadline_ends_what_runs_and_what_waits(engine):
    began = time.monotonic()
    jobs = [engine.submit(**LONG, timeout=0.3) for _ in range(2)]
    for job in jobs:
        with pytest.raises(DeadlineExceeded, match="timeout of 0.3 seconds"):
            job.result(WAIT)
    assert time.monotonic() - began < 3
    assert jobs[0].times["started"] is not None


def test_result_waits_only_as_long_as_it_is_told_and_the_request_goes_on(engine):
    job = engine.submit(**LONG)
    with pytest.raises(concurrent.futures.TimeoutError):
        job.result(timeout=0.05)
    assert not job.done
    job.cancel()


def test_progress_counts_the_steps(engine):
    seen = []
    job = engine.submit(
        prompt="a dog", num_inference_steps=3, on_step=lambda job: seen.append((job.progress.step, job.progress.steps))
    )
    assert job.progress.step == 0
    job.result(WAIT)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_pipelines_own_callback_is_called_with_the_requests_own_pipeline(engine):
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append((step, values["latents"].shape[0], pipe is engine.pipe))
        return {}

    engine.submit(prompt="a dog", num_inference_steps=2, callback_on_step_end=callback).result(WAIT)
    assert seen == [(0, 1, False), (1, 1, False)]


def test_a_callback_that_raises_fails_its_own_request(engine):
    def fail(_):
        raise OSError("the disk is full")

    bad, good = engine.submit(prompt="a dog", num_inference_steps=2, on_step=fail), Asked().submit(engine)
    with pytest.raises(OSError, match="full"):
        bad.result(WAIT)
    assert good.result(WAIT).images.shape == (1, 16, 16, 3)


def test_a_job_is_awaited_and_cancelled_from_asyncio(engine):
    async def main():
        job = Asked().submit(engine)
        assert (await asyncio.wrap_future(job.future)).images.shape == (1, 16, 16, 3)
        left = engine.submit(**LONG)
        task = asyncio.ensure_future(asyncio.wrap_future(left.future))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0)
        return left

    left = asyncio.run(main())
    with pytest.raises(Cancelled):
        left.result(WAIT)
    wait_for(lambda: engine.running == 0)


def test_times_are_those_of_submission_start_and_end(engine):
    job = Asked().submit(engine)
    job.result(WAIT)
    assert job.times["submitted"] <= job.times["started"] <= job.times["done"]
