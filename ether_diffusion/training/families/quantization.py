"""The frozen denoiser in fewer bits: the weights of its layers, which are brought back to the dtype of the arithmetic.

Adapters stay in float32. nf4 and int8 are read by diffusers through other packages; fp8 needs none.
"""

import importlib.util
from typing import Any

import torch
from diffusers import ModelMixin

from ether_diffusion.errors import InputError

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": None}
"""Kind -> the package that it needs."""
BITS = {"nf4": 4.5, "int8": 8, "fp8": 8}
"""Bits of a weight, with the scales that belong to it."""


def check_quantization(kind: str | None, device: torch.device) -> None:
    """Make sure that the weights can be quantised so.

    Raises:
        InputError: the package is missing, or needs a GPU.
    """
    package = PACKAGES.get(kind) if kind else None
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f'--quantize {kind}: {package} is not installed; pip install "ether-diffusion[quantized]"')
    if kind == "nf4" and device.type == "cpu":
        raise InputError("--quantize nf4: diffusers needs a GPU for it; use int8 or fp8")


def loading_config(kind: str | None, dtype: torch.dtype) -> Any:
    """The quantisation config with which a model is read; None where it is read as it is."""
    if kind == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if kind == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return None


def quantize_loaded(model: ModelMixin, kind: str | None, dtype: torch.dtype) -> None:
    """What is left to do for a model that was read with `loading_config`."""
    if kind == "fp8":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
