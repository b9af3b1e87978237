"""Linear layers of a model as every backend makes them that diffusers quantises with: in place, on the CPU."""

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

BLOCK = 32
"""Numbers that share a scale, where a backend has blocks: a layer of other widths stays as it is."""


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in model.named_modules() if _is_linear(layer, name)]


def _is_linear(layer: nn.Module, _name: str) -> bool:
    return type(layer) is nn.Linear and layer.in_features % BLOCK == 0


def bitsandbytes_8bit(model: nn.Module) -> None:
    _bitsandbytes(model, "Linear8bitLt", has_fp16_weights=False)


def bitsandbytes_4bit(model: nn.Module) -> None:
    _bitsandbytes(model, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32)


def _bitsandbytes(model: nn.Module, kind: str, **options: object) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    for name, layer in linears(model):
        quantized = getattr(bitsandbytes.nn, kind)(
            layer.in_features, layer.out_features, bias=layer.bias is not None, **options
        )
        quantized.load_state_dict(layer.state_dict())
        model.set_submodule(name, quantized.to("cpu"))


def torchao_int8(model: nn.Module) -> None:
    _torchao(model, "Int8WeightOnlyConfig")


def torchao_int8_dynamic(model: nn.Module) -> None:
    _torchao(model, "Int8DynamicActivationInt8WeightConfig")


def torchao_int4(model: nn.Module) -> None:
    """Its weight-only int4 of the CPU; `Int4WeightOnlyConfig` needs kernels of GPUs."""
    _torchao(model, "IntxWeightOnlyConfig", weight_dtype=torch.int4)


def torchao_fp8(model: nn.Module) -> None:
    _torchao(model, "Float8WeightOnlyConfig")


def _torchao(model: nn.Module, config: str, **options: object) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="the extra `quantized` is not installed")
    torchao.quantize_(model, getattr(torchao, config)(**options), filter_fn=_is_linear)


def quanto_int8(model: nn.Module) -> None:
    _quanto(model, "qint8")


def quanto_int4(model: nn.Module) -> None:
    _quanto(model, "qint4")


def quanto_fp8(model: nn.Module) -> None:
    _quanto(model, "qfloat8")


def _quanto(model: nn.Module, kind: str) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="the extra `quantized` is not installed")
    quanto.quantize(model, weights=getattr(quanto, kind), include=[name for name, _ in linears(model)])
    quanto.freeze(model)


def gguf(model: nn.Module) -> None:
    """Built from the layers: diffusers reads whole files of the released models only."""
    library = pytest.importorskip("gguf", reason="the extra `quantized` is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter  # imports the library

    kind = library.GGMLQuantizationType.Q8_0
    for name, layer in linears(model):
        quantized = GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32
        )
        packed = library.quants.quantize(layer.weight.detach().numpy(), kind)
        quantized.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
        quantized.bias = layer.bias
        model.set_submodule(name, quantized)


def layerwise_fp8(model: nn.Module) -> None:
    dtypes = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    apply_layerwise_casting(model, **dtypes, skip_modules_pattern=("embed", "norm", "conv", "proj_in", "proj_out"))


BACKENDS = {
    # How far a layer is from being linear: some round what goes into it, too.
    bitsandbytes_8bit: 0.1,
    bitsandbytes_4bit: 2e-3,
    torchao_int8: 2e-3,
    torchao_int8_dynamic: 0.1,
    torchao_int4: 2e-3,
    torchao_fp8: 2e-3,
    quanto_int8: 2e-3,
    quanto_int4: 2e-3,
    quanto_fp8: 2e-3,
    gguf: 2e-3,
    layerwise_fp8: 2e-3,
}
"""Each with how far images may be from those of the same weights in floating point."""


@torch.no_grad()
def dequantized(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A model with the weights that a quantised copy of it computes with, in floating point."""
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear:
            of = quantized.get_submodule(name)
            bias = of(torch.zeros(1, layer.in_features))
            layer.weight.copy_((of(torch.eye(layer.in_features)) - bias).T)
            if layer.bias is not None:
                layer.bias.copy_(bias[0])
    return model
