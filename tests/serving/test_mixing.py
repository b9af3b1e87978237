"""The products of a mixed batch against the dense definition, one row at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ether_diffusion.serving.mixing import Pass, add_convolution, add_linear, padded_rank

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1), "stride": 2},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 1},
]


def random_pass(rows, inputs, outputs, rank, of=None):
    down, up = torch.randn(rows, rank, inputs).double(), torch.randn(rows, rank, outputs).double()
    return Pass(down, up, of if of is None else torch.tensor(of)[:, None, None])


def changed(layer, x, change, row):
    """The layer with the dense change of a row, on this row alone."""
    weight = layer.weight + (change.up[row].T @ change.down[row]).view(layer.weight.shape)
    return torch.func.functional_call(layer, {"weight": weight}, (x[row : row + 1],))[0]


@given(middle=st.lists(st.integers(1, 3), max_size=2), rank=st.sampled_from([4, 8]), bias=st.booleans())
def test_linear_rows_are_the_dense_definition(middle, rank, bias):
    layer, x = nn.Linear(6, 5, bias=bias).double(), torch.randn(3, *middle, 6).double()
    change = random_pass(3, 6, 5, rank, of=[True, False, True])
    y = layer(x)
    found = add_linear(x, y, change)
    for row in (0, 2):
        torch.testing.assert_close(found[row], changed(layer, x, change, row))
    assert torch.equal(found[1], y[1])


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_rows_of_convolutions_are_the_dense_definition(options):
    layer = nn.Conv2d(4, 6, **options).double()
    x = torch.randn(3, 4, 7, 8).double()
    change = random_pass(3, layer.weight[0].numel(), 6, 4, of=[True, False, True])
    y = layer(x)
    found = add_convolution(x, y, change, layer)
    for row in (0, 2):
        torch.testing.assert_close(found[row], changed(layer, x, change, row))
    assert torch.equal(found[1], y[1])


def test_the_output_lies_in_memory_as_the_layers_own():
    layer = nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 7, 8).double().to(memory_format=torch.channels_last)
    y = layer(x)
    assert add_convolution(x, y, random_pass(2, 36, 6, 4), layer).stride() == y.stride() != y.contiguous().stride()


def test_a_negative_zero_of_a_row_without_a_change_stays_one():
    x, y = torch.ones(2, 3, 4).double(), torch.full((2, 3, 5), -0.0).double()
    change = random_pass(2, 4, 5, 4, of=[False, True])
    change.down[0] = change.up[0] = 0
    assert add_linear(x, y, change)[0].signbit().all()


def test_ranks_are_padded_by_themselves_alone():
    assert [padded_rank(rank) for rank in (1, 4, 5, 8, 9, 64, 65)] == [4, 4, 8, 8, 16, 64, 128]
