"""Every answer is what the stock pipeline makes of that request alone, whatever runs beside it."""

import threading
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers import flow_zoo, zoo
from helpers.pipelines import ONE_GREY_LEVEL, open_pipeline
from helpers.serving import SCHEDULERS, WAIT, Alone, Asked, distance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ether_diffusion.miniature import load_pipeline
from ether_diffusion.serving import Cancelled, Engine, EngineClosed


@pytest.fixture
def alone(tiny_pipeline_folder) -> Alone:
    return Alone(open_pipeline(tiny_pipeline_folder))


def test_eight_schedulers_with_mixed_steps_and_guidance_are_right_in_one_batch(tiny_pipeline, alone):
    asked = [
        Asked(f"a dog {k}", name, steps=2 + k % 3, guidance=(1.0, 3.0, 7.5)[k % 3], seed=k)
        for k, name in enumerate(SCHEDULERS)
    ]
    with Engine(tiny_pipeline, max_batch=16) as engine:
        jobs = [each.submit(engine) for each in asked]
        far = {each.scheduler: distance(job, alone.images(each)) for each, job in zip(asked, jobs, strict=True)}
    assert max(far.values()) <= ONE_GREY_LEVEL, far
    assert engine.counts.largest > 8  # they were joined


def test_a_batch_of_one_is_the_stock_pipeline_bit_for_bit(tiny_pipeline, alone):
    asked = [Asked(scheduler=name, guidance=guidance) for name in SCHEDULERS for guidance in (1.0, 5.0)]
    with Engine(tiny_pipeline, max_batch=1) as engine:
        jobs = [each.submit(engine) for each in asked]
        assert all(distance(job, alone.images(each)) == 0 for job, each in zip(jobs, asked, strict=True))


def test_the_miniature_generates_the_same_images(tmp_path):
    pipe, stock = load_pipeline(), Alone(load_pipeline())
    for each in (pipe, stock.pipe):
        each.set_progress_bar_config(disable=True)
    asked = [Asked("a red cube", "PNDMScheduler", 3, seed=1), Asked("a blue ball", "EulerDiscreteScheduler", 4)]
    with Engine(pipe, max_batch=4) as engine:
        jobs = [each.submit(engine) for each in asked]
        assert all(distance(job, stock.images(each)) <= ONE_GREY_LEVEL for job, each in zip(jobs, asked, strict=True))


@pytest.mark.parametrize("name", ["sd3", "flux", "klein", "qwen", "z_image", "chroma", "sana", "lumina2", "krea2"])
def test_transformers_generate_the_same_images(name, tmp_path):
    pipe, side = flow_zoo.make(name, tmp_path), flow_zoo.SIDES.get(name, 16)
    options = {"height": side, "width": side, "output_type": "np", **flow_zoo.SIZED.get(name, {})}
    asked = [{"prompt": prompt, "num_inference_steps": 2 + k} for k, prompt in enumerate(("a dog", "a cat"))]
    expected = [pipe(**each, **options, generator=torch.Generator().manual_seed(7)).images for each in asked]
    with Engine(pipe, max_batch=4) as engine:
        jobs = [engine.submit(**each, **options, seed=7) for each in asked]
        assert max(map(distance, jobs, expected)) <= ONE_GREY_LEVEL
    rows = engine.counts.rows
    assert rows / engine.counts.forwards > 1  # some were joined


def test_sdxl_generates_the_same_images(tiny_pipeline):
    pipe = zoo.sdxl(tiny_pipeline)
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    expected = [pipe("a dog", **options, generator=torch.Generator().manual_seed(k)).images for k in range(3)]
    with Engine(pipe, max_batch=6) as engine:
        jobs = [engine.submit(prompt="a dog", **options, seed=k) for k in range(3)]
        assert max(map(distance, jobs, expected)) <= ONE_GREY_LEVEL
    assert engine.counts.largest == 6


def test_other_sizes_and_several_images_are_right_beside_each_other(tiny_pipeline, alone):
    asked = [
        {"prompt": "a dog", "height": 32, "width": 16},
        {"prompt": ["a dog", "a cat"], "num_images_per_prompt": 2},
        {"prompt": "a dog", "guidance_rescale": 0.5},
    ]
    options = {"num_inference_steps": 2, "output_type": "np"}
    expected = [alone.pipe(**each, **options, generator=torch.Generator().manual_seed(3)).images for each in asked]
    with Engine(tiny_pipeline, max_batch=12) as engine:
        jobs = [engine.submit(**each, **options, seed=3) for each in asked]
        assert max(map(distance, jobs, expected)) <= ONE_GREY_LEVEL


def test_image_to_image_runs_beside_text_to_image(tiny_pipeline, alone):
    image = Image.new("RGB", (16, 16), "red")
    options = {"prompt": "a dog", "num_inference_steps": 4, "output_type": "np"}
    stock = StableDiffusionImg2ImgPipeline.from_pipe(alone.pipe)
    expected = stock(image=image, **options, generator=torch.Generator().manual_seed(0)).images
    with Engine(tiny_pipeline, max_batch=4) as engine:
        other = engine.submit(pipeline=StableDiffusionImg2ImgPipeline, image=image, **options, seed=0)
        jobs = engine.submit(**options, seed=0), other
        assert distance(jobs[0], alone.images(Asked(steps=4, guidance=7.5))) <= ONE_GREY_LEVEL
        assert distance(jobs[1], expected) <= ONE_GREY_LEVEL
    assert engine.counts.largest == 4
    assert jobs[1].progress.step == jobs[1].progress.steps == 3


def test_a_seed_for_each_image_is_a_generator_for_each(tiny_pipeline, alone):
    with Engine(tiny_pipeline, max_batch=4) as engine:
        job = engine.submit(
            prompt=["a dog"] * 2, seed=[5, 6], num_inference_steps=2, guidance_scale=5.0, output_type="np"
        )
        images = job.result(WAIT).images
    for k, seed in enumerate((5, 6)):
        assert np.abs(images[k] - alone.images(Asked(seed=seed))[0]).max() <= ONE_GREY_LEVEL


def test_drawn_seeds_are_told_and_give_the_image_again_without_the_global_random_numbers(tiny_pipeline):
    before = torch.get_rng_state()
    with Engine(tiny_pipeline, max_batch=4) as engine:
        jobs = [engine.submit(prompt="a dog", num_inference_steps=2, output_type="np") for _ in range(2)]
        assert jobs[0].seed != jobs[1].seed
        again = engine.submit(prompt="a dog", num_inference_steps=2, output_type="np", seed=jobs[0].seed)
        assert distance(again, jobs[0].result(WAIT).images) <= ONE_GREY_LEVEL
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pipeline_is_as_before_when_the_engine_is_closed(tiny_pipeline):
    parts, attributes = dict(tiny_pipeline.components), dict(tiny_pipeline.__dict__)
    steps, threads = tiny_pipeline.scheduler.num_inference_steps, set(threading.enumerate())
    with Engine(tiny_pipeline, max_batch=2) as engine:
        engine.submit(prompt="a dog", num_inference_steps=2).result(WAIT)
    assert tiny_pipeline.components == parts and tiny_pipeline.__dict__ == attributes
    assert tiny_pipeline.scheduler.num_inference_steps == steps
    assert not [each for each in set(threading.enumerate()) - threads if each.name in ("engine", "request")]


def test_leaving_the_engine_finishes_what_was_submitted_and_takes_no_more(tiny_pipeline):
    with Engine(tiny_pipeline, max_batch=2) as engine:
        jobs = [engine.submit(prompt="a dog", num_inference_steps=2) for _ in range(4)]
    assert all(job.done and job.result().images for job in jobs)
    with pytest.raises(EngineClosed):
        engine.submit(prompt="a dog")
    engine.close()  # twice does nothing


def test_closing_without_draining_stops_everything(tiny_pipeline):
    for pause in np.linspace(0, 0.02, 10):  # at every moment of a request's life
        engine = Engine(tiny_pipeline, max_batch=2)
        jobs = [engine.submit(prompt="a dog", num_inference_steps=900) for _ in range(3)]
        time.sleep(pause)
        engine.close(drain=False)
        assert all(isinstance(job.future.exception(WAIT), EngineClosed) for job in jobs)


def test_a_request_cannot_close_the_engine_that_runs_it(tiny_pipeline):
    with Engine(tiny_pipeline, max_batch=2) as engine:
        job = engine.submit(prompt="a dog", num_inference_steps=2, on_step=lambda _: engine.close())
        with pytest.raises(RuntimeError, match="would wait for itself"):
            job.result(WAIT)
        engine.submit(prompt="a dog", num_inference_steps=2).result(WAIT)


def test_what_a_pipeline_raises_concerns_its_own_request_alone(tiny_pipeline, alone):
    with Engine(tiny_pipeline, max_batch=8) as engine:
        bad = engine.submit(prompt=3)
        good = Asked().submit(engine)
        with pytest.raises(ValueError, match="has to be of type"):
            bad.result(WAIT)
        assert distance(good, alone.images(Asked())) <= ONE_GREY_LEVEL


def test_clients_take_turns(tiny_pipeline):
    order = []
    with Engine(tiny_pipeline, max_batch=1) as engine:
        for client, count in (("many", 4), ("one", 1)):
            for k in range(count):
                done = lambda _, who=f"{client}{k}": order.append(who)  # noqa: E731
                engine.submit(prompt="a dog", num_inference_steps=2, client=client).future.add_done_callback(done)
    assert order.index("one0") <= 1 + (order[0] == "many0")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_itself_ends_every_request_and_takes_no_more(tiny_pipeline, monkeypatch):
    with Engine(tiny_pipeline, max_batch=2) as engine:

        def fault(_):
            raise AssertionError("a fault")

        monkeypatch.setattr(engine._forwards, "choose", fault)
        jobs = [engine.submit(prompt="a dog", num_inference_steps=900)]
        with pytest.raises(EngineClosed, match="a fault"):
            jobs[0].result(WAIT)
        with pytest.raises(EngineClosed):
            engine.submit(prompt="a dog")


class Arrivals:
    """Submits requests when so many steps of all have been done, and cancels some at a step of theirs."""

    def __init__(self, engine, plan):
        self.engine, self.steps, self.jobs = engine, 0, {}
        self.plan = plan

    def submit_due(self, _=None):
        for k, (asked, arrival, cancelled_at) in enumerate(self.plan):
            if k not in self.jobs and arrival <= self.steps:
                self.jobs[k] = None
                self.jobs[k] = asked.submit(self.engine, client=str(k % 2), on_step=self.on_step(cancelled_at))
                if cancelled_at == 0:
                    self.jobs[k].cancel()

    def on_step(self, cancelled_at):
        def after(job):
            self.steps += 1
            if job.progress.step == cancelled_at:
                job.cancel()
            self.submit_due()

        return after


requests = st.builds(
    Asked,
    prompt=st.sampled_from(["a dog", "a cat"]),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    steps=st.integers(1, 4),
    guidance=st.sampled_from([1.0, 5.0]),
    seed=st.integers(0, 1),
)
plans = st.lists(st.tuples(requests, st.integers(0, 6), st.sampled_from([None, None, 0, 1])), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def shared_engine(tiny_pipeline_folder):
    with Engine(open_pipeline(tiny_pipeline_folder), max_batch=5) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_alone(tiny_pipeline_folder):
    return Alone(open_pipeline(tiny_pipeline_folder))


@given(plan=plans)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_arrivals_cancellations_and_exits_change_nothing_for_the_others(shared_engine, shared_alone, plan):
    arrivals = Arrivals(shared_engine, plan)
    while len(arrivals.jobs) < len(plan):
        arrivals.submit_due()
        for job in filter(None, list(arrivals.jobs.values())):
            job.future.exception(WAIT) if not job.future.cancelled() else None
        arrivals.steps += 6  # whoever still waits for steps comes now
    for k, (asked, _, cancelled_at) in enumerate(plan):
        job = arrivals.jobs[k]
        if cancelled_at is None:
            assert distance(job, shared_alone.images(asked)) <= ONE_GREY_LEVEL
        elif cancelled_at == 0:
            assert job.future.exception(WAIT) is None or isinstance(job.future.exception(), Cancelled)
        else:
            with pytest.raises(Cancelled):
                job.result(WAIT)
    assert shared_engine.waiting == 0
