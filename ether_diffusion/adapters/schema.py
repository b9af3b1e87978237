"""What an adapter file holds: vectors and configs of one adapter on the components of a pipeline, and all checks.

`pytorch_ether_weights.safetensors` holds `<component>.<module path>.<vector>` tensors of shape (n, d/n) and, in the
safetensors metadata, one JSON document under "ether" and, under "sha256", a digest over both. From format version 2 on
it may also hold modules that were trained as they are: a control encoder, or modules that replace some of a component.

The digest tells damage, not malice: whoever changes a file can sign it again. So nothing that a file says is believed
before it is checked, and nothing in it (a name, a pattern, a path) is opened, run or matched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, StringConstraints, field_validator
from torch import Tensor

from ether_diffusion.adapters.encoder_entry import check_encoder
from ether_diffusion.adapters.entries import Entry, validated
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import normalize

WEIGHTS_NAME = "pytorch_ether_weights.safetensors"
FORMAT_VERSION = 2
"""Of files with modules beside vectors; others are written as version 1, which earlier releases read."""
VECTORS = EtherLayer.adapter_layer_names
VECTOR_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

# Far above any real adapter; below them, reading costs at most about as much memory as the file, and some megabytes.
MAX_TENSORS = 1 << 14
MAX_WIDTH = 1 << 20  # numbers in one vector
LOOKED_AT = 1 << 16  # numbers that are checked at a time
MAX_WEIGHT = 1 << 24  # numbers in one weight of a module
MAX_WEIGHTS = 1 << 28  # numbers in all weights of modules together
MAX_MODULES = 256


@dataclass
class ModuleWeights:
    """Weights of one component that were trained as they are: parameter path -> tensor of any shape.

    `about` says which they are: {"config": …} of a control encoder, of which they are all parameters, or {"modules":
    [paths]} of modules in a component of the pipeline, of which they are all parameters.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class AdapterFile:
    """One adapter: for each component its config and its vectors, `<module path>.<vector>` -> (n, d/n).

    The key of `configs` and `tensors` is the component's name in the pipeline; None where a file does not name it.
    `weights` are the modules that it holds besides vectors, by component; a control encoder is "control_encoder".
    """

    configs: dict[str | None, EtherConfig]
    tensors: dict[str | None, dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = "state dict"
    weights: dict[str, ModuleWeights] = field(default_factory=dict)


def expected_vectors(config: EtherConfig) -> tuple[str, ...]:
    """The names of the vectors that a layer has under a config."""
    kinds = ("ether_u",) if config.method == "ether" else ("ether_u", "ether_v")
    return kinds if config.sides == "input" else (*kinds, *(f"{kind}_out" for kind in kinds))


def without_base_layer(path: str) -> str:
    """A module path without PEFT's own `base_layer` steps, which appear where adapters are stacked."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def canonical_path(component: str, path: str) -> str:
    """The module path that files carry: CLIP text encoders' paths begin with `text_model.` in every release."""
    path = without_base_layer(path)
    in_clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if in_clip else path


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its elements, however they are strided in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # 1×1 kernels in channels_last count as contiguous as well
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def digest(tensors: Mapping[str, Tensor], document: str) -> str:
    """SHA-256 over the document and, in the order of their names, every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        total.update(f"\0{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        total.update(bytes_of(tensors[name]))
    return total.hexdigest()


# The document -------------------------------------------------------------------------------------------------

ModulePath = Annotated[str, StringConstraints(min_length=1)]


class ConfigEntry(Entry):
    """An EtherConfig, as far as it describes the adapter and not the model."""

    method: str = "ether"
    num_blocks: int = 1
    sides: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None


class ModulesEntry(Entry):
    """What the document says of the modules that replace those of a component."""

    modules: Annotated[list[ModulePath], Field(min_length=1, max_length=MAX_MODULES)]

    @field_validator("modules")
    @classmethod
    def _apart(cls, modules: list[str]) -> list[str]:
        if len(set(modules)) < len(modules) or any(a.startswith(f"{b}.") for a in modules for b in modules):
            raise ValueError("each module is listed once, and none lies within another")
        return modules


class Document(Entry):
    """What a file says of itself. Its writer may add entries of its own (the prompt); these are `model_extra`."""

    model_config = ConfigDict(extra="allow")

    format_version: Annotated[int, Field(ge=1)]
    configs: dict[str, ConfigEntry]
    weights: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    base_model: str | None = None
    base_fingerprint: dict[str, dict[str, str]] = {}


def read_document(where: str, values: Mapping[str, Any]) -> Document:
    """The document of a file, after a look at its version.

    Raises:
        EtherFileError: a newer version (named), none, or an entry of another form.
    """
    number = values.get("format_version")
    if isinstance(number, int) and number > FORMAT_VERSION:
        raise EtherFileError(
            f"{where} was written by a newer release (format version {number}; this one reads up to {FORMAT_VERSION}):"
            " upgrade ether-diffusion"
        )
    if number == 1:  # in which such an entry is a remark of its writer
        values = {name: value for name, value in values.items() if name != "weights"}
    document = validated(Document, where, values)
    if wrong := [component for component in document.weights if not component or "." in component]:
        raise EtherFileError(f"{where}: weights: {wrong[0]!r} is not the name of a component")
    return document


def config_fields(component: str, config: EtherConfig) -> dict[str, Any]:
    """A config as the document holds it.

    Raises:
        ValueError: it trains weights of the model itself, which a pipeline file does not hold.
    """
    if config.bias != "none" or config.modules_to_save:
        what = f"bias={config.bias!r}" if config.bias != "none" else f"modules_to_save={config.modules_to_save!r}"
        raise ValueError(
            f"{component}: {what} trains weights of the model itself, which a pipeline file does not hold; "
            "save the model with PEFT's save_pretrained instead"
        )
    values = {name: getattr(config, name) for name in ConfigEntry.model_fields}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def build_config(where: str, entry: ConfigEntry) -> EtherConfig:
    """The config that an entry describes.

    Raises:
        EtherFileError: values that `EtherConfig` or a pipeline file does not take.
    """
    try:
        config = EtherConfig(**entry.model_dump())
        config_fields(where, config)
    except (TypeError, ValueError) as error:
        raise EtherFileError(f"{where}: the config is not valid: {error}") from error
    return config


# Tensors ------------------------------------------------------------------------------------------------------


def is_module_weight(name: str, components: Collection[str] | None) -> bool:
    """Whether a tensor of this name is a weight of a module of one of the components (None: of any), not a vector."""
    return name.rpartition(".")[2] not in VECTORS and (components is None or name.partition(".")[0] in components)


def check_total(where: str, numbers: int) -> None:
    """Raise `EtherFileError` where the weights of all modules together are more than any adapter has."""
    if numbers > MAX_WEIGHTS:
        raise EtherFileError(f"{where}: the weights of modules have {numbers} numbers; {MAX_WEIGHTS} at most fit")


def check_entry(where: str, dtype: str, shape: Sequence[int], of_module: bool = False) -> None:
    """What a header says of one tensor. Raises EtherFileError: a type or shape that no vector, or no weight, has."""
    if dtype not in VECTOR_DTYPES:
        raise EtherFileError(f"{where} is made of {dtype}; {', '.join(VECTOR_DTYPES)} fit")
    if of_module:
        if not 1 <= len(shape) <= 4 or 0 in shape or math.prod(shape) > MAX_WEIGHT:
            raise EtherFileError(
                f"{where} has shape {tuple(shape)}; one to four axes, none of length 0, with {MAX_WEIGHT} numbers at "
                "most, fit"
            )
    elif len(shape) != 2 or 0 in shape or shape[0] * shape[1] > MAX_WIDTH:
        raise EtherFileError(
            f"{where} has shape {tuple(shape)}; (blocks, width) fits, with {MAX_WIDTH} numbers at most"
        )


def split_components(where: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Vectors by component, then by `<module path>.<vector>`.

    Raises:
        EtherFileError: too many, none, a key of another form, or what is no tensor.
    """
    if len(tensors) > MAX_TENSORS:
        raise EtherFileError(f"{where} holds {len(tensors)} tensors; an adapter has {MAX_TENSORS} at most")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        component, _, key = str(name).partition(".")
        if not component or key.rpartition(".")[2] not in VECTORS or not key.rpartition(".")[0]:
            raise EtherFileError(f"{where}: {name!r} is not of the form <component>.<module path>.{'|'.join(VECTORS)}")
        if not isinstance(tensor, Tensor):
            raise EtherFileError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor")
        parts.setdefault(component, {})[key] = tensor.detach()
    if not parts:
        raise EtherFileError(f"{where} holds no vectors")
    return parts


def check_vectors(where: str, config: EtherConfig, vectors: Mapping[str, Tensor]) -> None:
    """Check one component's vectors, `<module path>.<vector>` -> (n, d/n), against their config and each other.

    Raises:
        EtherFileError: a vector that the method does not have, or lacks; a shape that is not n blocks, or differs on
            one side of a layer; numbers that are not finite; a block of length 0.
    """
    expected, n = expected_vectors(config), config.num_blocks
    suspects = _suspects(vectors)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in vectors.items():
        path, _, name = key.rpartition(".")
        if name not in expected:
            raise EtherFileError(
                f"{where}: {key} does not belong to {config.method} with sides={config.sides!r}, which has "
                f"{', '.join(expected)}"
            )
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0] != n or not 0 < tensor.numel() <= MAX_WIDTH:
            raise EtherFileError(
                f"{where}: {key} has shape {shape}, but num_blocks={n} needs ({n}, width / {n}), {MAX_WIDTH} at most"
            )
        if key in suspects and (flaw := _flaw(tensor)):
            raise EtherFileError(f"{where}: {key} {flaw}")
        shapes.setdefault(path, {})[name] = shape
    for path, own in shapes.items():
        if missing := set(expected) - set(own):
            raise EtherFileError(f"{where}: {path} lacks {', '.join(sorted(missing))}")
        for suffix in ("", "_out"):
            u, v = own.get(f"ether_u{suffix}"), own.get(f"ether_v{suffix}")
            if u and v and u != v:
                raise EtherFileError(f"{where}: {path}.ether_v{suffix} has shape {v}, but ether_u{suffix} has {u}")


def _suspects(vectors: Mapping[str, Tensor]) -> set[str]:
    """Names of vectors among which are all that have a flaw: those of one shape are looked at many at a time."""
    suspects, alike = set(), {}
    for key, tensor in vectors.items():
        if tensor.ndim == 2 and 0 < tensor.numel() <= MAX_WIDTH and tensor.dtype in VECTOR_DTYPES.values():
            alike.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), []).append(key)
        else:
            suspects.add(key)
    for (shape, *_), keys in alike.items():
        together = max(1, LOOKED_AT // math.prod(shape))
        for start in range(0, len(keys), together):
            part = keys[start : start + together]
            if _flaw(torch.cat([vectors[key] for key in part])):
                suspects.update(part)
    return suspects


def _flaw(tensor: Tensor) -> str | None:
    """What makes a vector (n, b) unusable, in words: its numbers are not finite, or a block has no direction."""
    if tensor.dtype not in VECTOR_DTYPES.values() or not torch.isfinite(tensor.float()).all():
        return (
            f"is not made of finite floating-point numbers ({', '.join(VECTOR_DTYPES)}) but of NaN, infinity or others"
        )
    lost = (normalize(tensor.float()) == 0).all(dim=-1).nonzero()
    if len(lost):
        return f"has no direction in block {lost[0].item()} of {len(tensor)}: a length that is neither 0 nor huge fits"
    return None


def check_weights(where: str, component: str, about: Any, tensors: Mapping[str, Tensor]) -> ModuleWeights:
    """Weights of modules of one component, against what the document says that they are.

    Raises:
        EtherFileError: an entry of another form, a name too many or too few, another shape, or numbers that are not
            finite.
    """
    if component == CONTROL:
        check_encoder(where, about, tensors)
    else:
        _check_modules(where, validated(ModulesEntry, f"{where}: weights", about).modules, tensors)
    names = {dtype: name for name, dtype in VECTOR_DTYPES.items()}
    for name, tensor in tensors.items():
        check_entry(f"{where}: {name}", names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), True)
        # In parts: a mask over all of a large weight would be as large again.
        if not all(torch.isfinite(part).all() for part in tensor.detach().reshape(-1).split(MAX_WIDTH)):
            raise EtherFileError(f"{where}: {name} is not made of finite numbers but of NaN or infinity")
    return ModuleWeights(about, dict(tensors))


def _check_modules(where: str, modules: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        if not any(name.startswith(f"{path}.") for path in modules):
            raise EtherFileError(f"{where}: {name} is in none of the modules that are listed: {', '.join(modules)}")
    for path in modules:
        if not any(name.startswith(f"{path}.") for name in tensors):
            raise EtherFileError(f"{where}: the module {path} is listed, but there are no weights of it")
