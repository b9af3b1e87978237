"""ETHER over the quantised layers of the libraries that diffusers loads them with, on the CPU and on a GPU."""

from collections.abc import Callable

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from helpers.oracle import dense_weight
from peft import PeftModel, get_peft_model
from torch import nn

from ether_diffusion import EtherConfig

# Slow, because the libraries come with `make test-slow`: installed, they slow down every import of diffusers.
pytestmark = pytest.mark.slow
bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
torchao = pytest.importorskip("torchao.quantization", reason="the extra `quantized` is not installed")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class OneLayer(nn.Module):
    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def torchao_int8(linear: nn.Linear, device: str) -> nn.Module:
    model = OneLayer(linear).to(device)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model.linear


def bitsandbytes_8bit(linear: nn.Linear, device: str) -> nn.Module:
    quantized = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    quantized.load_state_dict(linear.state_dict())
    return quantized.to(device)


def bitsandbytes_4bit(linear: nn.Linear, device: str) -> nn.Module:
    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32
    )
    quantized.load_state_dict(linear.state_dict())
    return quantized.to(device)


def stored_in_fp8(linear: nn.Linear, device: str) -> nn.Module:
    linear = linear.to(device)
    apply_layerwise_casting(linear, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return linear


# How far a layer is from being linear: bitsandbytes rounds what goes into an 8-bit layer, too.
KINDS: dict[Callable, float] = {
    torchao_int8: 1e-4,
    bitsandbytes_8bit: 2e-2,
    bitsandbytes_4bit: 1e-4,
    stored_in_fp8: 1e-4,
}


def build(quantize: Callable, device: str, method: str) -> tuple[nn.Module, PeftModel]:
    """The quantised layer, and a model with ETHER over it."""
    torch.manual_seed(0)
    base = quantize(nn.Linear(64, 96).requires_grad_(False), device)
    config = EtherConfig(method=method, num_blocks=2, target_modules=["linear"], init_weights=False)
    return base, get_peft_model(OneLayer(base), config)


def stored(base: nn.Module) -> list[torch.Tensor]:
    tensors = []
    for tensor in (base.weight, base.bias):
        inner = [getattr(tensor, name) for name in ("qdata", "scale") if hasattr(tensor, name)]
        tensors += [each.detach().clone() for each in inner or [tensor.data]]
    return tensors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("quantize", KINDS)
def test_values_and_gradients_are_those_of_the_dequantised_weight(quantize, method, device):
    base, model = build(quantize, device, method)
    before = stored(base)
    with torch.no_grad():
        bias = base(torch.zeros(1, 64, device=device)).double()
        weight = (base(torch.eye(64, device=device)) - bias).T
    vectors = model.base_model.model.linear.vectors("default")
    x = torch.randn(2, 7, 64, device=device, requires_grad=True)
    g = torch.randn(2, 7, 96, device=device)

    adapted = dense_weight(weight, *vectors)
    expected, answer = x.double() @ adapted.T + bias, model(x)
    assert answer.dtype == torch.float32
    for ours, theirs in zip(
        (answer, *torch.autograd.grad(answer, [x, *vectors.named().values()], g)),
        (expected, *torch.autograd.grad(expected, [x, *vectors.named().values()], g.double())),
        strict=True,
    ):
        assert (ours - theirs).norm() <= KINDS[quantize] * theirs.norm()
    assert all(torch.equal(new, old) for new, old in zip(stored(base), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantize", KINDS)
def test_merging_is_refused_and_deleting_leaves_the_base_as_it_was(quantize, device):
    base, model = build(quantize, device, "ether_plus")
    layer, before = model.base_model.model.linear, stored(base)
    for refused in (layer.merge, lambda: layer.get_delta_weight("default"), model.merge_and_unload):
        with pytest.raises(ValueError, match="is no plain floating-point tensor here"):
            refused()
    x = torch.randn(5, 64, device=device)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert model.unload().linear is base
    assert all(torch.equal(new, old) for new, old in zip(stored(base), before, strict=True))
