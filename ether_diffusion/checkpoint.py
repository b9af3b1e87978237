"""The adapter file: vectors and configs of one adapter on the components of a pipeline, and every check on it.

`pytorch_ether_weights.safetensors` holds `<component>.<module path>.<vector>` tensors of shape (n, d/n) and, in the
safetensors metadata, one JSON document under "ether" and, under "sha256", a digest over both.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ETHER, EtherConfig
from .layers import EtherLayer

WEIGHTS_NAME = "pytorch_ether_weights.safetensors"
FORMAT_VERSION = 1
PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
VECTORS = EtherLayer.adapter_layer_names
CONFIG_FIELDS = (
    "method", "num_blocks", "sides", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias", "modules_to_save",
)  # fmt: skip
DOCUMENT_FIELDS = ("format_version", "configs", "versions", "base_model", "base_fingerprint")
"""What a file says of itself, besides what its writer adds (the prompt)."""


@dataclass
class Checkpoint:
    """One adapter: for each component its config and its vectors, `<module path>.<vector>` -> (n, d/n).

    The key of `configs` and `tensors` is the component's name in the pipeline; None where a file does not name it.
    """

    configs: dict[str | None, EtherConfig]
    tensors: dict[str | None, dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = "state dict"


def expected_vectors(config: EtherConfig) -> tuple[str, ...]:
    """The names of the vectors that a layer has under a config."""
    kinds = ("ether_u",) if config.method == "ether" else ("ether_u", "ether_v")
    return kinds if config.sides == "input" else (*kinds, *(f"{kind}_out" for kind in kinds))


def canonical_path(component: str, path: str) -> str:
    """The module path that files carry: CLIP text encoders' paths begin with `text_model.` in every release.

    PEFT's own `base_layer` steps, which appear where adapters are stacked, are left out.
    """
    path = ".".join(part for part in path.split(".") if part != "base_layer")
    in_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if in_clip else path


def digest(tensors: Mapping[str, Tensor], document: str) -> str:
    """SHA-256 over the document and, in the order of their names, every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


# Writing ------------------------------------------------------------------------------------------------------


def _config_fields(component: str, config: EtherConfig) -> dict[str, Any]:
    if config.bias != "none" or config.modules_to_save:
        what = f"bias={config.bias!r}" if config.bias != "none" else f"modules_to_save={config.modules_to_save!r}"
        raise ValueError(
            f"{component}: {what} trains weights of the model itself, which a pipeline file does not hold; "
            "save the model with PEFT's save_pretrained instead"
        )
    values = {name: getattr(config, name) for name in CONFIG_FIELDS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all: the file appears under its name when it is complete.

    Raises:
        ValueError: a config with `bias` or `modules_to_save`, a vector that is not finite, or nothing to write.
    """
    tensors = {
        f"{component}.{key}": tensor.detach().cpu().contiguous()
        for component, vectors in checkpoint.tensors.items()
        for key, tensor in vectors.items()
    }
    if not tensors:
        raise ValueError("there is no ETHER adapter to save")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity: the adapter is broken and was not saved")
    document = {
        **checkpoint.metadata,
        "format_version": FORMAT_VERSION,
        "configs": {component: _config_fields(component, c) for component, c in checkpoint.configs.items()},
        "versions": {
            name: version(name) for name in ("ether-diffusion", "diffusers", "peft", "torch", "transformers")
        },
    }
    text = json.dumps(document, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, partial, {"format": "pt", "ether": text, "sha256": digest(tensors, text)})
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


# Reading ------------------------------------------------------------------------------------------------------


def is_pickle_by_name(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICKLE_SUFFIXES


def _open(path: Path, needs: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file whose metadata has the key `needs`.

    Raises:
        ValueError: anything but a whole safetensors file; a pickle is named as such and never read.
    """
    if is_pickle_by_name(path):
        raise ValueError(f"{path} is a pickle by its name, and pickles are not read: save it as .safetensors")
    with path.open("rb") as file:
        head = file.read(9)  # of a safetensors file: eight bytes of length, then a JSON object
    if head[8:] != b"{" and head[:1] in (b"P", b"\x80"):
        raise ValueError(f"{path} holds a pickle, whatever its name says, and pickles are not read")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            readable = needs is None or needs in header  # a foreign file may be large: it is not read to be refused
            tensors = {name: file.get_tensor(name) for name in file.keys()} if readable else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error
    if not readable:
        raise ValueError(f"{path} is a safetensors file, but holds no ETHER adapter (no {needs!r} in its metadata)")
    return tensors, header


def _parse(where: str | Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{where} is a JSON {type(document).__name__}, not an object")
    return document


def _check_names(where: str, values: Mapping[str, Any]) -> None:
    """The types of a config's module names: EtherConfig takes whatever PEFT may make of them.

    Raises:
        ValueError: names that are neither text nor a list of texts, or layer indices that are no whole numbers.
    """
    for name, kind in {
        "target_modules": str,
        "exclude_modules": str,
        "layers_pattern": str,
        "layers_to_transform": int,
    }.items():
        value = values.get(name)
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(entry, kind) for entry in entries):
            raise ValueError(f"{where}: {name}={value!r} is neither {kind.__name__} nor a list of {kind.__name__}")


def _build_config(where: str, values: Any) -> EtherConfig:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: the config is a {type(values).__name__}, not an object")
    _check_names(where, values)
    try:
        config = EtherConfig(**{name: values[name] for name in CONFIG_FIELDS if name in values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the config is not valid: {error}") from error
    _config_fields(where, config)
    return config


def _split_components(where: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, key = str(name).partition(".")
        if not component or key.rpartition(".")[2] not in VECTORS or not key.rpartition(".")[0]:
            raise ValueError(f"{where}: {name!r} is not of the form <component>.<module path>.{'|'.join(VECTORS)}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor")
        parts.setdefault(component, {})[key] = tensor
    if not parts:
        raise ValueError(f"{where} holds no vectors")
    return parts


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify an adapter file.

    Raises:
        ValueError: not a safetensors file, damaged, not an ETHER adapter, or of a newer format; names the file.
    """
    tensors, header = _open(path, needs="ether")
    signed = {"format": "pt", "ether": header["ether"], "sha256": digest(tensors, header["ether"])}
    if header != signed:
        raise ValueError(f"{path} is damaged: its content does not match the SHA-256 in its metadata")
    document = _parse(f"{path}: the metadata", header["ether"])
    number = document.get("format_version")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{path}: the metadata has no format_version that is a whole number from 1 on: {number!r}")
    if number > FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by a newer release (format version {number}; this one reads up to {FORMAT_VERSION}): "
            "upgrade ether-diffusion"
        )
    parts, configs = _split_components(str(path), tensors), document.get("configs")
    if not isinstance(configs, dict) or set(configs) != set(parts):
        held = sorted(configs) if isinstance(configs, dict) else f"no components ({configs!r})"
        raise ValueError(f"{path}: there are vectors for {sorted(parts)}, but configs for {held}")
    built = {component: _build_config(f"{path}: {component}", values) for component, values in configs.items()}
    return Checkpoint(built, parts, document, str(path))


def read_peft_folder(folder: Path) -> Checkpoint:
    """Read what PEFT's `save_pretrained` wrote for one model; the component is not known yet (None).

    Raises:
        ValueError: another method's adapter, or a damaged file.
    """
    try:
        text = (folder / PEFT_CONFIG_NAME).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / PEFT_CONFIG_NAME} is not text: {error}") from error
    values = _parse(folder / PEFT_CONFIG_NAME, text)
    if values.get("peft_type") != ETHER:
        raise ValueError(f"{folder} holds a PEFT adapter of type {values.get('peft_type')!r}, not {ETHER.value!r}")
    config = _build_config(str(folder / PEFT_CONFIG_NAME), values)
    tensors, _ = _open(folder / PEFT_WEIGHTS_NAME)
    if not tensors:
        raise ValueError(f"{folder / PEFT_WEIGHTS_NAME} holds no vectors")
    prefix = "base_model.model."
    return Checkpoint(
        {None: config}, {None: {k.removeprefix(prefix): t for k, t in tensors.items()}}, source=str(folder)
    )


def from_state_dict(tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint from `<component>.<module path>.<vector>` tensors; method, sides and blocks are read off them.

    Raises:
        ValueError: a key of another form, or no vectors at all.
    """
    parts = _split_components("state dict", tensors)
    configs = {}
    for component, vectors in parts.items():
        names = {key.rpartition(".")[2] for key in vectors}
        first = next(iter(vectors.values()))
        paths = sorted({key.rpartition(".")[0] for key in vectors})
        configs[component] = EtherConfig(
            method="ether_plus" if "ether_v" in names else "ether",
            sides="both" if "ether_u_out" in names else "input",
            num_blocks=first.shape[0] if first.ndim == 2 and first.shape[0] else 1,
            target_modules=paths,
        )
    return Checkpoint(configs, parts)
