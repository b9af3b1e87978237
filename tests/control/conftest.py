"""Pipelines with a control encoder."""

import pytest
from helpers.control import make_encoder, open_control
from helpers.pipelines import adapt

from ether_diffusion import (
    ControlEncoder,
    EtherControlPipeline,
)


@pytest.fixture
def plain(tiny_pipeline_folder) -> EtherControlPipeline:
    return open_control(tiny_pipeline_folder)


@pytest.fixture
def pipe(plain) -> EtherControlPipeline:
    """With one adapter, "default": vectors and an encoder that does something."""
    adapt(plain, num_blocks=2)
    plain.add_control("default", make_encoder(plain))
    return plain


@pytest.fixture
def encoder_calls(pipe, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that encoders are called with."""
    calls, forward = [], ControlEncoder.forward
    monkeypatch.setattr(ControlEncoder, "forward", lambda self, x: calls.append(tuple(x.shape)) or forward(self, x))
    return calls
