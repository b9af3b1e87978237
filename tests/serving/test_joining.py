"""Joined arguments are those of the calls, row after row, and the output is split as they were joined."""

import inspect

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.serving.joining import NotJoinable, count_rows, join, key_of, repeat, split

UNET = "UNet2DConditionModel"


def bind(kind, *args, **kwargs):
    signature = inspect.signature(kind.forward)
    without_self = signature.replace(parameters=list(signature.parameters.values())[1:])
    return without_self.bind(*args, **kwargs)


def unet_call(rows=2, timestep=7, width=8, seed=0, **others):
    generator = torch.Generator().manual_seed(seed)
    return bind(
        UNet2DConditionModel,
        torch.randn(rows, 4, width, 8, generator=generator),
        timestep,
        encoder_hidden_states=torch.randn(rows, 5, 6, generator=generator),
        return_dict=False,
        **others,
    )


def test_rows_follow_each_other_and_each_has_its_timestep():
    calls = [unet_call(2, torch.tensor(7)), unet_call(1, torch.tensor(3.5), seed=1), unet_call(3, 9, seed=2)]
    assert len({key_of(UNET, call) for call in calls}) == 1
    joined = join(UNET, calls)
    assert count_rows(joined) == 6
    assert torch.equal(joined.arguments["sample"], torch.cat([call.arguments["sample"] for call in calls]))
    assert joined.arguments["timestep"].tolist() == [7, 7, 3.5, 9, 9, 9]
    assert joined.arguments["return_dict"] is False
    assert calls[0].arguments["timestep"].ndim == 0  # nothing of the calls has changed


@pytest.mark.parametrize(
    "other",
    [
        unet_call(width=16),
        unet_call(cross_attention_kwargs={"scale": 0.5}),
        unet_call(added_cond_kwargs={"text_embeds": torch.zeros(2, 3)}),
        unet_call(timestep_cond=torch.zeros(2, 3)),
        unet_call(mid_block_additional_residual=torch.zeros(2, 3)),
    ],
)
def test_calls_that_differ_elsewhere_are_not_joined(other):
    assert key_of(UNET, unet_call()) != key_of(UNET, other)


def test_arguments_that_are_not_joined_may_be_equal_tensors():
    residuals = torch.arange(6.0).reshape(2, 3)
    same = [unet_call(mid_block_additional_residual=each) for each in (residuals, residuals.clone())]
    assert key_of(UNET, same[0]) == key_of(UNET, same[1])
    residuals += 1  # in place: what is remembered of it is out of date
    assert key_of(UNET, same[0]) != key_of(UNET, same[1])


def test_tensors_of_inference_mode_are_compared_too():
    with torch.inference_mode():
        same = [unet_call(mid_block_additional_residual=torch.ones(2, 3)) for _ in range(2)]
    assert key_of(UNET, same[0]) == key_of(UNET, same[1])


def test_nested_conditions_are_joined_by_row():
    calls = [unet_call(added_cond_kwargs={"text_embeds": torch.full((2, 3), float(k))}) for k in range(2)]
    joined = join(UNET, calls)
    assert joined.arguments["added_cond_kwargs"]["text_embeds"][:, 0].tolist() == [0, 0, 1, 1]


def test_an_unknown_model_and_arguments_without_rows_are_called_alone():
    assert key_of("MyModel", unet_call()) is None
    assert key_of(UNET, unet_call(timestep_cond=torch.zeros(1, 3))) is None


def test_position_ids_without_a_row_for_each_image_have_to_be_equal():
    def call(ids):
        return bind(FluxTransformer2DModel, hidden_states=torch.zeros(1, 4, 4), timestep=torch.ones(1), img_ids=ids)

    ids = torch.arange(12.0).reshape(4, 3)
    kind = "FluxTransformer2DModel"
    assert key_of(kind, call(ids)) == key_of(kind, call(ids.clone())) != key_of(kind, call(ids + 1))
    joined = join(kind, [call(ids), call(ids.clone())])
    assert joined.arguments["img_ids"].shape == (4, 3) and joined.arguments["hidden_states"].shape == (2, 4, 4)


def test_lists_of_captions_of_different_lengths_are_joined():
    def call(length):
        return bind(ZImageTransformer2DModel, [torch.zeros(4, 1, 8, 8)], torch.ones(1), [torch.zeros(length, 16)])

    kind = "ZImageTransformer2DModel"
    assert key_of(kind, call(3)) == key_of(kind, call(5))
    joined = join(kind, [call(3), call(5)])
    assert [len(each) for each in joined.arguments["cap_feats"]] == [3, 5] and joined.arguments["t"].shape == (2,)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_splitting_gives_every_call_its_own_rows_of_every_kind_of_output(counts):
    rows = torch.arange(sum(counts))
    outputs = split((rows, [row for row in rows], UNet2DConditionOutput(sample=rows), None), counts)
    for each, expected in zip(outputs, rows.split(counts), strict=True):
        tensor, listed, named, nothing = each
        assert torch.equal(tensor, expected) and torch.equal(named.sample, expected) and nothing is None
        assert [int(row) for row in listed] == expected.tolist()


def test_an_output_without_rows_is_refused():
    with pytest.raises(NotJoinable):
        split((torch.zeros(3),), [1, 1])


def test_a_call_is_repeated_by_its_first_row():
    repeated = repeat(UNET, unet_call(2, torch.tensor(7)), 3)
    assert count_rows(repeated) == 3 and repeated.arguments["timestep"].tolist() == [7, 7, 7]
    assert torch.equal(repeated.arguments["sample"][2], unet_call(2).arguments["sample"][0])
