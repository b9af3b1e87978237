"""Adapters on quantised pipelines: every backend that diffusers has, and every call of the pipeline's."""

import numpy as np
import pytest
import torch
from helpers.pipelines import adapt, generate
from helpers.quantized import BACKENDS, dequantized, layerwise_fp8
from helpers.tiny import make_pipeline
from torch import nn

from ether_diffusion import EtherLayer, enable_ether_attention
from ether_diffusion.export import export_lora, merge_adapters

# Slow, because the libraries come with `make test-slow`; layerwise casting is diffusers' own.
CASES = [
    pytest.param(backend, marks=[] if backend is layerwise_fp8 else pytest.mark.slow, id=backend.__name__)
    for backend in BACKENDS
]


def make(tokenizer):
    return make_pipeline(tokenizer, width=32, text_width=32)  # a multiple of every backend's blocks


@pytest.fixture(params=["ether", "ether_plus"])
def vectors(request, tiny_tokenizer) -> dict[str, torch.Tensor]:
    return adapt(make(tiny_tokenizer), request.param, num_blocks=2).ether_state_dict()


def quantize(pipe, backend):
    backend(pipe.unet)
    backend(pipe.text_encoder)
    return pipe


def state(pipe) -> list:
    """Modules, attributes and stored bytes of the quantised models."""
    found = []
    for model in (pipe.unet, pipe.text_encoder):
        found += [sorted(model.__dict__), [(name, type(module)) for name, module in model.named_modules()]]
        found += [(name, type(tensor), id(tensor)) for name, tensor in model.named_parameters()]
    return found


def adapted(pipe) -> int:
    return sum(
        isinstance(module, EtherLayer) for model in (pipe.unet, pipe.text_encoder) for module in model.modules()
    )


@pytest.mark.parametrize("backend", CASES)
def test_load_save_exchange_delete_and_unload(backend, vectors, tiny_tokenizer, tmp_path):
    pipe = quantize(make(tiny_tokenizer), backend)
    base, before = generate(pipe), state(pipe)
    pipe.load_ether_weights(vectors, "dog")
    image = generate(pipe)
    floating = make(tiny_tokenizer)
    for component in ("unet", "text_encoder"):
        dequantized(getattr(floating, component), getattr(quantize(make(tiny_tokenizer), backend), component))
    floating.load_ether_weights(vectors)
    assert abs(generate(floating) - image).max() <= BACKENDS[backend] < abs(base - image).max()

    file = pipe.save_ether_weights(tmp_path / "dog")
    floating.unload_ether_weights()
    floating.load_ether_weights(file, "dog")
    saved = floating.ether_state_dict()
    assert saved.keys() == vectors.keys() and all(torch.equal(saved[name], vectors[name]) for name in vectors)

    pipe.load_ether_weights({name: tensor.flip(-1) for name, tensor in vectors.items()}, "dog", hotswap=True)
    assert abs(generate(pipe) - image).max() > 1e-3
    pipe.load_ether_weights(file, "dog", hotswap=True)
    assert np.array_equal(generate(pipe), image)
    pipe.delete_adapters("dog")
    assert np.array_equal(generate(pipe), base) and state(pipe) == before

    pipe.load_ether_weights(file, "dog")
    assert np.array_equal(generate(pipe), image) and not pipe.ether_adapters["dog"].other_base
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe), base) and state(pipe) == before


@pytest.mark.parametrize("backend", CASES)
def test_strengths_and_several_adapters(backend, vectors, tiny_tokenizer):
    pipe = quantize(make(tiny_tokenizer), backend)
    base = generate(pipe)
    pipe.load_ether_weights(vectors, "dog")
    image = generate(pipe)
    pipe.load_ether_weights({name: tensor.flip(-1) for name, tensor in vectors.items()}, "cat")
    pipe.set_adapters(["dog", "cat"], [1.0, 0.0])
    assert np.array_equal(generate(pipe), image)
    pipe.set_adapters(["dog", "cat"], [1.0, 0.5])
    assert abs(generate(pipe) - image).max() > 1e-3
    pipe.disable_ether()
    assert np.array_equal(generate(pipe), base)
    pipe.enable_ether()
    pipe.set_adapters("dog")
    enable_ether_attention(pipe.unet)
    assert abs(generate(pipe) - image).max() <= 1 / 255


@pytest.mark.parametrize("backend", CASES)
@pytest.mark.parametrize("call", ["fuse", "fuse from disk", "export", "merge"])
def test_what_needs_floating_point_raises_before_anything_changes(backend, call, tiny_tokenizer, tmp_path):
    calls = {
        "fuse": lambda: pipe.fuse_ether(),
        "fuse from disk": lambda: pipe.fuse_ether(["unet"], keep_original="disk"),
        "export": lambda: export_lora(pipe, tmp_path / "out", to="kohya"),
        "merge": lambda: merge_adapters(pipe, tmp_path / "out"),
    }
    pipe = quantize(make(tiny_tokenizer), backend)
    adapt(pipe, name="dog")
    image, before = generate(pipe), state(pipe)
    with pytest.raises(ValueError, match="is no plain floating-point tensor here .* neither quantised nor offloaded"):
        calls[call]()
    assert np.array_equal(generate(pipe), image) and state(pipe) == before
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("backend", CASES)
def test_an_adapter_that_does_not_fit_changes_nothing(backend, vectors, tiny_tokenizer):
    pipe = quantize(make(tiny_tokenizer), backend)
    before = state(pipe)
    misfits = {name.replace("mid_block", "nowhere"): tensor for name, tensor in vectors.items()}
    with pytest.raises(ValueError, match="nowhere.* does not exist in this UNet2DConditionModel"):
        pipe.load_ether_weights(misfits, "dog")
    assert state(pipe) == before and not adapted(pipe) and not pipe.get_list_adapters()
    assert not any(tensor.is_meta for tensor in pipe.unet.parameters())
    assert nn.Linear(2, 2).weight.device.type == "cpu"
