"""A joint forward that fails is made again by halves: only the culprit fails, and nobody waits for ever."""

import pytest
import torch
from helpers.pipelines import ONE_GREY_LEVEL, open_pipeline
from helpers.serving import WAIT, Alone, Asked, distance

from ether_diffusion.serving import Engine


@pytest.fixture
def alone(tiny_pipeline_folder) -> Alone:
    return Alone(open_pipeline(tiny_pipeline_folder))


def test_only_the_culprit_of_a_failing_forward_fails(tiny_pipeline, alone):
    def refuse_nan(_module, args):
        if torch.isnan(args[0]).any():
            raise ArithmeticError("not a number")

    tiny_pipeline.unet.conv_in.register_forward_pre_hook(refuse_nan)
    good = [Asked(seed=k, steps=2 + k) for k in range(3)]
    with Engine(tiny_pipeline, max_batch=8) as engine:
        jobs = [each.submit(engine) for each in good]
        bad = engine.submit(prompt="a dog", num_inference_steps=2, latents=torch.full((1, 4, 8, 8), torch.nan))
        with pytest.raises(ArithmeticError):
            bad.result(WAIT)
        assert all(distance(job, alone.images(each)) <= ONE_GREY_LEVEL for job, each in zip(jobs, good, strict=True))
        assert engine.counts.failed


def test_a_batch_for_which_the_memory_is_not_enough_is_not_tried_again(tiny_pipeline, alone):
    tried = []

    def little_memory(_module, args):
        tried.append(len(args[0]))
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("no more")

    tiny_pipeline.unet.conv_in.register_forward_pre_hook(little_memory)
    asked = [Asked(seed=k, steps=3) for k in range(4)]
    with Engine(tiny_pipeline, max_batch=8) as engine:
        jobs = [each.submit(engine) for each in asked]
        assert all(distance(job, alone.images(each)) <= ONE_GREY_LEVEL for job, each in zip(jobs, asked, strict=True))
    assert sum(rows > 4 for rows in tried) <= 1


def test_a_request_larger_than_the_batch_runs_and_those_behind_it_too(tiny_pipeline, alone):
    with Engine(tiny_pipeline, max_batch=2) as engine:
        small = [Asked(seed=k).submit(engine) for k in range(2)]
        large = engine.submit(
            prompt=["a dog"] * 4, seed=[0, 1, 2, 3], num_inference_steps=2, guidance_scale=5.0, output_type="np"
        )
        small += [Asked(seed=k).submit(engine) for k in range(2, 4)]
        images = large.result(WAIT).images
        for k, job in enumerate(small):
            assert distance(job, alone.images(Asked(seed=k))) <= ONE_GREY_LEVEL
            assert abs(images[k] - alone.images(Asked(seed=k))[0]).max() <= ONE_GREY_LEVEL
    assert engine.counts.largest == 8


def test_requests_that_cannot_be_joined_take_turns(tiny_pipeline):
    order = []
    with Engine(tiny_pipeline, max_batch=8) as engine:
        for side in (16, 32, 48):
            engine.submit(
                prompt="a dog",
                height=side,
                width=16,
                num_inference_steps=4,
                on_step=lambda job, side=side: order.append(side),
            )
    assert len(order) == 12
    assert all(set(order[k : k + 3]) == {16, 32, 48} for k in range(3, 9, 3))
