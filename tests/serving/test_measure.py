"""The batch is as large as is worth its while."""

import pytest
import torch
from helpers import flow_zoo
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.errors import InputError
from ether_diffusion.serving import Engine
from ether_diffusion.serving.measure import knee, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # rows cost what they cost alone
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.3}, 4),
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),
        ({1: 1.0, 2: 1.92}, 1),  # cheaper by less than the margin
        ({1: 1.0}, 1),
    ],
)
def test_the_knee_is_the_last_size_that_makes_a_row_cheaper(seconds, best):
    assert knee(seconds) == best


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_with_a_fixed_cost_and_a_cost_for_each_row_it_lies_where_the_fixed_share_is_small(fixed, per_row):
    best = knee({b: fixed + per_row * b for b in (1, 2, 4, 8, 16)})
    assert best == 16 or fixed / best / 2 < 0.05 * (fixed / best + per_row) * 1.0001


def test_memory_that_is_spent_ends_the_measurement():
    def forward(rows):
        if rows > 2:
            raise torch.OutOfMemoryError("no more")

    measured = measure(forward, CPU, sizes=(1, 2, 4))
    assert set(measured.seconds) == {1, 2} and "4 rows did not fit" in measured.remark


def test_auto_measures_the_pipelines_own_denoiser_and_takes_the_knee(tiny_pipeline):
    with Engine(tiny_pipeline) as engine:
        measured = engine.measurement
        assert engine.max_batch == measured.max_batch == knee(measured.seconds) and 1 in measured.seconds
        assert measured.per_row[1] == measured.seconds[1]


def test_a_number_is_taken_as_it_is(tiny_pipeline):
    with Engine(tiny_pipeline, max_batch=3) as engine:
        assert engine.max_batch == 3 and engine.measurement is None


def test_arguments_that_the_pipeline_needs_are_given_as_typical(tmp_path):
    pipe = flow_zoo.make("sd3", tmp_path)
    with pytest.raises(InputError, match="typical="):
        Engine(pipe, typical={"prompt": 3})
    with Engine(pipe, typical={"prompt": "a dog", "height": 16, "width": 16}) as engine:
        assert engine.max_batch >= 1


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", True, None])
@pytest.mark.parametrize("name", ["max_batch", "max_line", "host_bytes"])
def test_what_is_no_size_is_refused_before_anything_is_measured(name, wrong):
    with pytest.raises(InputError, match=f"{name}={wrong!r}: a positive whole number"):
        Engine(None, **{name: wrong})


def test_a_missing_folder_of_adapters_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Engine(None, tmp_path / "none")


def test_a_model_whose_calls_are_not_joined_gets_a_batch_of_one(tiny_pipeline):
    class OtherUNet(type(tiny_pipeline.unet)):
        """A model that nothing is known of."""

    tiny_pipeline.unet.__class__ = OtherUNet
    with Engine(tiny_pipeline) as engine:
        assert engine.max_batch == 1 and "calls of OtherUNet are not joined" in engine.measurement.remark
        assert engine.submit(prompt="a dog", num_inference_steps=2).result(60).images
