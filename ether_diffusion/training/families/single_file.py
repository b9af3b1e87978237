"""A base model whose weights are one file: which pipeline it is, and where its configs and tokenizers come from."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ether_diffusion.errors import InputError

SUFFIX, PICKLES = ".safetensors", (".ckpt", ".pt", ".pth", ".bin")
UNET_PREFIX = "model.diffusion_model."
CONFIG_FILES = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.model"]


def is_single_file(path: str) -> bool:
    """Whether a base model is given as one file."""
    return path.lower().endswith((SUFFIX, *PICKLES)) and not Path(path).is_dir()


def configs_of(path: str, given: str | None) -> str:
    """The folder with configs and tokenizers of the pipeline whose weights are in a file.

    Args:
        path: of the file.
        given: a folder or an id on the Hub that the user names; by default the kind is told from the file.

    Raises:
        InputError: no such file, one of another kind, or configs that are neither here nor to be had.
    """
    where = f"--pretrained_model_name_or_path {path}"
    if path.lower().endswith(PICKLES):
        raise InputError(f"{where}: may run code when it is read; convert it to {SUFFIX}")
    if not Path(path).is_file():
        raise InputError(f"{where}: there is no such file")
    source = _known_pipeline(path, where)
    if given is not None and Path(given).is_dir():
        return given
    source = given or source
    try:
        return snapshot_download(source, allow_patterns=CONFIG_FILES)
    except Exception as error:  # of the Hub, the network and the cache, of many kinds
        patterns = " ".join(f"--include {pattern!r}" for pattern in CONFIG_FILES)
        raise InputError(
            f"{where}: needs the configs and tokenizers of {source}, which cannot be had ({type(error).__name__}); "
            "name a pipeline's folder by --config_name_or_path, or where there is a network, "
            f"hf download {source} {patterns}"
        ) from error


def _known_pipeline(path: str, where: str) -> str:
    """The id of the pipeline that diffusers takes a file's names and shapes for."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except Exception as error:  # a damaged header
        raise InputError(f"{where}: cannot be read as {SUFFIX} ({type(error).__name__}: {error})") from error
    if not any(name.startswith(UNET_PREFIX) for name in names):  # diffusers takes all else for Stable Diffusion 1
        raise InputError(f"{where}: holds no whole model, none of its names begins with {UNET_PREFIX}")
    return fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
