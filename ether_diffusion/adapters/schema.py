"""The adapter file: vectors and configs of one adapter on the components of a pipeline, and every check on it.

`pytorch_ether_weights.safetensors` holds `<component>.<module path>.<vector>` tensors of shape (n, d/n) and, in the
safetensors metadata, one JSON document under "ether" and, under "sha256", a digest over both. From format version 2 on
it may also hold weights that were trained as a whole: a control encoder, or modules of a component.

The digest tells damage, not malice: whoever changes a file can sign it again. So nothing that a file says is believed
before it is checked, and nothing in it (a name, a pattern, a path) is opened, run or matched.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ether_diffusion.control.encoder import CONTROL, ControlEncoder
from ether_diffusion.errors import EtherFileError
from ether_diffusion.files import replace_file
from ether_diffusion.tuner.config import ETHER, EtherConfig
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.transforms import normalize

WEIGHTS_NAME = "pytorch_ether_weights.safetensors"
FORMAT_VERSION = 2
"""Of files with whole weights; others are written as version 1, which earlier releases read."""
PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
VECTORS = EtherLayer.adapter_layer_names
CONFIG_FIELDS = (
    "method", "num_blocks", "sides", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias", "modules_to_save",
)  # fmt: skip
DOCUMENT_FIELDS = ("format_version", "configs", "weights", "versions", "base_model", "base_fingerprint")
"""What a file says of itself, besides what its writer adds (the prompt)."""
ENCODER_FIELDS = ("out_channels", "conditioning_channels", "block_out_channels", "interpolation")
VECTOR_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

# Far above any real adapter; below them, reading costs at most about as much memory as the file, and some megabytes.
MAX_HEADER_BYTES = 4 << 20
MAX_VECTORS = 1 << 14
MAX_WIDTH = 1 << 20
MAX_WEIGHT = 1 << 24  # numbers in one whole tensor
MAX_WEIGHTS = 1 << 26  # numbers in all whole tensors together
MAX_CHANNELS = 1 << 14
MAX_LEVELS = 8
MAX_MODULES = 256
MAX_DOCUMENT_BYTES = 1 << 20
MAX_DOCUMENT_VALUES = 20_000
MAX_HEADER_VALUES = 8 * MAX_VECTORS + MAX_DOCUMENT_VALUES  # eight to an entry: name, type, two sizes, two offsets, …


@dataclass
class WholeWeights:
    """Weights of one component that were trained as they are: parameter path -> tensor of any shape.

    `about` says which they are: {"config": …} of a control encoder, of which they are all parameters, or {"modules":
    [paths]} in a component of the pipeline, of which they are all parameters.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class AdapterFile:
    """One adapter: for each component its config and its vectors, `<module path>.<vector>` -> (n, d/n).

    The key of `configs` and `tensors` is the component's name in the pipeline; None where a file does not name it.
    `weights` are what it holds besides vectors, by component; those of a control encoder under "control_encoder".
    """

    configs: dict[str | None, EtherConfig]
    tensors: dict[str | None, dict[str, Tensor]]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = "state dict"
    weights: dict[str, WholeWeights] = field(default_factory=dict)


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


def write_adapter_file(path: Path, checkpoint: AdapterFile) -> None:
    """Write a checkpoint, whole or not at all: the file appears under its name when all of it is on the disk.

    Whatever happens before (a full disk, a kill, a power cut), a file of that name stays as it was. What could not be
    read again is not written.

    Raises:
        ValueError: a config with `bias` or `modules_to_save`, a vector or weight that is broken, or nothing to write.
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = {
        f"{component}.{key}": tensor.detach().cpu().contiguous()
        for component, vectors in checkpoint.tensors.items()
        for key, tensor in vectors.items()
    }
    for component, whole in checkpoint.weights.items():
        tensors |= {f"{component}.{key}": tensor.detach().cpu().contiguous() for key, tensor in whole.tensors.items()}
    if not tensors:
        raise ValueError("there is no ETHER adapter to save")
    document = {
        **checkpoint.metadata,
        "format_version": FORMAT_VERSION if checkpoint.weights else 1,
        "configs": {component: _config_fields(component, c) for component, c in checkpoint.configs.items()},
        "versions": {
            name: version(name) for name in ("ether-diffusion", "diffusers", "peft", "torch", "transformers")
        },
    }
    document.pop("weights", None)
    if checkpoint.weights:
        document["weights"] = {component: whole.about for component, whole in checkpoint.weights.items()}
    text = json.dumps(document, sort_keys=True)
    _interpret(f"{path} was not saved", tensors, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(tensors, {"format": "pt", "ether": text, "sha256": digest(tensors, text)}))


# Reading ------------------------------------------------------------------------------------------------------


def is_pickle_by_name(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICKLE_SUFFIXES


def _count_values(text: bytes) -> int:
    """About how many values there are in JSON, without parsing it."""
    return sum(map(text.count, (b"[", b"{", b",")))


def _check_start(path: Path) -> None:
    """Refuse, from its length and its header's bytes, what is no safetensors file, or would cost far more memory.

    Raises:
        EtherFileError: not a file, a pickle (named as such, never read), or a header longer than there is room for, or
            far larger than any adapter's.
    """
    if is_pickle_by_name(path):
        raise EtherFileError(f"{path} is a pickle by its name, and pickles are not read: save it as .safetensors")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        raise EtherFileError(f"{path} is not a file")
    with path.open("rb") as file:
        head = file.read(9)  # of a safetensors file: eight bytes of length, then a JSON object
        header = head[8:] + file.read(MAX_HEADER_BYTES - 1)
    if head[8:] != b"{" and head[:1] in (b"P", b"\x80"):
        raise EtherFileError(f"{path} holds a pickle, whatever its name says, and pickles are not read")
    length, room = int.from_bytes(head[:8], "little"), status.st_size - 8
    if len(head) < 9 or length > room:
        raise EtherFileError(
            f"{path} is not a whole safetensors file (cut short or damaged): its header would be {length} bytes, but "
            f"{max(room, 0)} are there"
        )
    if length > MAX_HEADER_BYTES:
        raise EtherFileError(f"{path} has a header of {length} bytes; an adapter's has {MAX_HEADER_BYTES} at most")
    if (values := _count_values(header[:length])) > MAX_HEADER_VALUES:
        raise EtherFileError(
            f"{path} has about {values} values in its header; an adapter has {MAX_HEADER_VALUES} at most"
        )


def _open(path: Path, needs: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, mapped from the disk, and the metadata of a safetensors file whose metadata has the key `needs`.

    Raises:
        EtherFileError: anything but a whole safetensors file of vectors: no data is read before the header is checked.
    """
    _check_start(path)
    try:
        with safe_open(path, "pt") as file:
            header, names = file.metadata() or {}, file.keys()
            if needs is not None and needs not in header:
                raise EtherFileError(
                    f"{path} is a safetensors file, but holds no ETHER adapter (no {needs!r} in its metadata)"
                )
            if len(names) > MAX_VECTORS:
                raise EtherFileError(f"{path} holds {len(names)} tensors; an adapter has {MAX_VECTORS} at most")
            components, total = _announced(header.get("ether", "")) if needs == "ether" else (), 0
            for name in names:
                entry, whole = file.get_slice(name), _is_whole(name, components)
                _check_entry(f"{path}: {name}", entry.get_dtype(), entry.get_shape(), whole)
                total += math.prod(entry.get_shape()) if whole else 0
            _check_total(path, total)
            return {name: file.get_tensor(name) for name in names}, header
    except EtherFileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise EtherFileError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error


def _announced(text: str) -> Collection[str] | None:
    """The components of which a document says that the file holds whole weights; None: the document is broken."""
    try:
        document = _parse("", text.encode())
        _check_document("", document)
        return _weights_entry("", document)
    except EtherFileError:
        return None  # `_interpret` says what is wrong with it, once the digest has shown that nothing is damaged


def _is_whole(name: str, components: Collection[str] | None) -> bool:
    """Whether a tensor of this name is a whole weight of one of the components (None: of any), not a vector."""
    return name.rpartition(".")[2] not in VECTORS and (components is None or name.partition(".")[0] in components)


def _check_total(where: str | Path, numbers: int) -> None:
    if numbers > MAX_WEIGHTS:
        raise EtherFileError(f"{where}: the whole weights have {numbers} numbers; {MAX_WEIGHTS} at most fit")


def _check_entry(where: str, dtype: str, shape: Sequence[int], whole: bool = False) -> None:
    """What a header says of one tensor. Raises EtherFileError: a type or shape that no vector, or no weight, has."""
    if dtype not in VECTOR_DTYPES:
        raise EtherFileError(f"{where} is made of {dtype}; {', '.join(VECTOR_DTYPES)} fit")
    if whole:
        if not 1 <= len(shape) <= 4 or 0 in shape or math.prod(shape) > MAX_WEIGHT:
            raise EtherFileError(
                f"{where} has shape {tuple(shape)}; one to four axes, none of length 0, with {MAX_WEIGHT} numbers at "
                "most, fit"
            )
        return
    if len(shape) != 2 or 0 in shape or shape[0] * shape[1] > MAX_WIDTH:
        raise EtherFileError(
            f"{where} has shape {tuple(shape)}; (blocks, width) fits, with {MAX_WIDTH} numbers at most"
        )


def _parse(where: str | Path, text: bytes) -> dict[str, Any]:
    """A JSON object from untrusted text, after a look at its size: parsed, it can be thirty times as large.

    Raises:
        EtherFileError: too long, not JSON, or not an object.
    """
    size, values = len(text), _count_values(text)
    if size > MAX_DOCUMENT_BYTES or values > MAX_DOCUMENT_VALUES:
        raise EtherFileError(
            f"{where} has {size} bytes and about {values} values; at most {MAX_DOCUMENT_BYTES} and "
            f"{MAX_DOCUMENT_VALUES} fit"
        )
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # of ValueErrors: not UTF-8, not JSON, a number of 5,000 digits
        raise EtherFileError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise EtherFileError(f"{where} is a JSON {type(document).__name__}, not an object")
    return document


def _check_names(where: str, values: Mapping[str, Any]) -> None:
    """The types of a config's module names: EtherConfig takes whatever PEFT may make of them.

    Raises:
        EtherFileError: names that are neither text nor a list of texts, or layer indices that are no whole numbers.
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
            raise EtherFileError(f"{where}: {name}={value!r} is neither {kind.__name__} nor a list of {kind.__name__}")


def _build_config(where: str, values: Any) -> EtherConfig:
    if not isinstance(values, dict):
        raise EtherFileError(f"{where}: the config is a {type(values).__name__}, not an object")
    _check_names(where, values)
    try:
        config = EtherConfig(**{name: values[name] for name in CONFIG_FIELDS if name in values})
        _config_fields(where, config)
    except (TypeError, ValueError) as error:
        raise EtherFileError(f"{where}: the config is not valid: {error}") from error
    return config


def _split_components(where: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    if len(tensors) > MAX_VECTORS:
        raise EtherFileError(f"{where} holds {len(tensors)} tensors; an adapter has {MAX_VECTORS} at most")
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


def _check_vectors(where: str, config: EtherConfig, vectors: Mapping[str, Tensor]) -> None:
    """Check one component's vectors, `<module path>.<vector>` -> (n, d/n), against their config and each other.

    Raises:
        EtherFileError: a vector that the method does not have, or lacks; a shape that is not n blocks, or differs on
            one side of a layer; numbers that are not finite; a block of length 0.
    """
    expected, n = expected_vectors(config), config.num_blocks
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
        if flaw := _flaw(tensor):
            raise EtherFileError(f"{where}: {key} {flaw}")
        shapes.setdefault(path, {})[name] = shape
    for path, own in shapes.items():
        if missing := set(expected) - set(own):
            raise EtherFileError(f"{where}: {path} lacks {', '.join(sorted(missing))}")
        for suffix in ("", "_out"):
            u, v = own.get(f"ether_u{suffix}"), own.get(f"ether_v{suffix}")
            if u and v and u != v:
                raise EtherFileError(f"{where}: {path}.ether_v{suffix} has shape {v}, but ether_u{suffix} has {u}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def _check_document(where: str, document: Mapping[str, Any]) -> None:
    """The version of a document, and the types of what it says of itself.

    Raises:
        EtherFileError: a newer version (named), none, or an entry of another type.
    """
    number = document.get("format_version")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise EtherFileError(
            f"{where}: the metadata has no format_version that is a whole number from 1 on: {number!r}"
        )
    if number > FORMAT_VERSION:
        raise EtherFileError(
            f"{where} was written by a newer release (format version {number}; this one reads up to {FORMAT_VERSION}):"
            " upgrade ether-diffusion"
        )
    base, prints = document.get("base_model"), document.get("base_fingerprint", {})
    if not isinstance(base, str | None):
        raise EtherFileError(f"{where}: base_model={base!r} is neither a text nor null")
    if not isinstance(prints, dict) or not all(map(_is_texts, prints.values())):
        raise EtherFileError(f"{where}: base_fingerprint={prints!r} is not component -> dtype -> SHA-256")
    if not _is_texts(document.get("versions", {})):
        raise EtherFileError(f"{where}: versions={document['versions']!r} is not library -> version")


def _check_weights(where: str, component: str, about: Any, tensors: Mapping[str, Tensor]) -> WholeWeights:
    """Whole weights of one component, against what the document says that they are.

    Raises:
        EtherFileError: an entry of another form, a name too many or too few, another shape, or numbers that are not
            finite.
    """
    kind = "config" if component == CONTROL else "modules"
    if not isinstance(about, dict) or set(about) != {kind}:
        raise EtherFileError(f'{where}: the entry in "weights" is {about!r}; {{"{kind}": …}} fits')
    if component == CONTROL:
        _check_encoder(where, about["config"], tensors)
    else:
        _check_modules(where, about["modules"], tensors)
    for name, tensor in tensors.items():
        _check_entry(f"{where}: {name}", _dtype_name(tensor), tuple(tensor.shape), whole=True)
        if not all(torch.isfinite(part).all() for part in tensor.detach().reshape(-1).split(MAX_WIDTH)):
            raise EtherFileError(f"{where}: {name} is not made of finite numbers but of NaN or infinity")
    return WholeWeights(about, dict(tensors))


def _dtype_name(tensor: Tensor) -> str:
    return next((name for name, dtype in VECTOR_DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))


def _check_modules(where: str, modules: Any, tensors: Mapping[str, Tensor]) -> None:
    listed = isinstance(modules, list) and all(isinstance(path, str) and path for path in modules)
    if not listed or not 0 < len(modules) <= MAX_MODULES or len(set(modules)) != len(modules):
        raise EtherFileError(
            f"{where}: modules={modules!r} is not a list of module paths, each once, {MAX_MODULES} at most"
        )
    if within := next((a for a in modules for b in modules if a.startswith(f"{b}.")), None):
        raise EtherFileError(f"{where}: modules: {within} lies within another that is listed")
    for name in tensors:
        if not any(name.startswith(f"{path}.") for path in modules):
            raise EtherFileError(f"{where}: {name} is in none of the modules that are listed: {', '.join(modules)}")
    for path in modules:
        if not any(name.startswith(f"{path}.") for name in tensors):
            raise EtherFileError(f"{where}: the module {path} is listed, but there are no weights of it")


def _check_encoder(where: str, values: Any, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(values, dict) or set(values) != set(ENCODER_FIELDS):
        held = sorted(values) if isinstance(values, dict) else repr(values)
        raise EtherFileError(f"{where}: the config has {held}; needed are {', '.join(ENCODER_FIELDS)}")
    numbers, widths = [values["out_channels"], values["conditioning_channels"]], values["block_out_channels"]
    numbers += widths if isinstance(widths, list) else [None]
    if not all(type(n) is int and 1 <= n <= MAX_CHANNELS for n in numbers) or len(numbers) > 2 + MAX_LEVELS:
        raise EtherFileError(
            f"{where}: the config has out_channels, conditioning_channels and block_out_channels {numbers}; whole "
            f"numbers from 1 to {MAX_CHANNELS}, and {MAX_LEVELS} widths at most, fit"
        )
    try:
        with torch.device("meta"):  # shapes alone: the sizes are the file's
            needed = {name: tuple(p.shape) for name, p in ControlEncoder(**values).named_parameters()}
    except (TypeError, ValueError) as error:
        raise EtherFileError(f"{where}: the config is not valid: {error}") from error
    if wrong := sorted(set(needed) ^ set(tensors)):
        raise EtherFileError(
            f"{where}: {wrong[0]} {'is missing' if wrong[0] in needed else 'is no weight of a control encoder'}"
        )
    for name, shape in needed.items():
        if tuple(tensors[name].shape) != shape:
            raise EtherFileError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, but the config needs {shape}"
            )


def _interpret(where: str, tensors: Mapping[str, Tensor], text: str) -> AdapterFile:
    """The checkpoint that tensors and a document of a pipeline file make up.

    Raises:
        EtherFileError: whatever is wrong with them without a look at a pipeline.
    """
    document = _parse(f"{where}: the metadata", text.encode())
    _check_document(where, document)
    about, configs = _weights_entry(where, document), document.get("configs")
    whole = {name: tensor for name, tensor in tensors.items() if _is_whole(name, about)}
    vectors = {name: tensor for name, tensor in tensors.items() if name not in whole}
    parts = _split_components(where, vectors) if vectors or not whole else {}
    if not isinstance(configs, dict) or set(configs) != set(parts):
        held = sorted(configs) if isinstance(configs, dict) else f"no components ({configs!r})"
        raise EtherFileError(f"{where}: there are vectors for {sorted(parts)}, but configs for {held}")
    built = {}
    for component, values in configs.items():
        built[component] = _build_config(f"{where}: {component}", values)
        if unknown := sorted(set(values) - set(CONFIG_FIELDS)):
            raise EtherFileError(
                f"{where}: {component}: the config has {unknown}; known are {', '.join(CONFIG_FIELDS)}"
            )
        _check_vectors(f"{where}: {component}", built[component], parts[component])
    by_component: dict[str, dict[str, Tensor]] = {component: {} for component in about}
    for name, tensor in whole.items():
        component, _, key = name.partition(".")
        by_component[component][key] = tensor
    _check_total(where, sum(tensor.numel() for tensor in whole.values()))
    weights = {
        component: _check_weights(f"{where}: {component}", component, about[component], own)
        for component, own in by_component.items()
    }
    return AdapterFile(built, parts, document, where, weights)


def _weights_entry(where: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says of whole weights, by component.

    Raises:
        EtherFileError: not by component. In a file of version 1, such an entry is a remark of its writer.
    """
    about = document.get("weights", {}) if document["format_version"] > 1 else {}
    if not isinstance(about, dict):
        raise EtherFileError(f"{where}: weights={about!r} is not component -> what is held of it")
    if wrong := [component for component in about if not component or "." in component]:
        raise EtherFileError(f"{where}: weights: {wrong[0]!r} is not the name of a component")
    return about


def read_adapter_file(path: Path) -> AdapterFile:
    """Read and verify an adapter file.

    Raises:
        EtherFileError: not a safetensors file, damaged, not an ETHER adapter, of a newer format, or with vectors that
            cannot be used; names the file and the key.
        OSError: the file is not there, or may not be read.
    """
    tensors, header = _open(path, needs="ether")
    signed = {"format": "pt", "ether": header["ether"], "sha256": digest(tensors, header["ether"])}
    if header != signed:
        raise EtherFileError(f"{path} is damaged: its content does not match the SHA-256 in its metadata")
    return _interpret(str(path), tensors, header["ether"])


def read_peft_folder(folder: Path) -> AdapterFile:
    """Read what PEFT's `save_pretrained` wrote for one model; the component is not known yet (None).

    Raises:
        EtherFileError: another method's adapter, or a damaged file.
    """
    config_path, weights_path = folder / PEFT_CONFIG_NAME, folder / PEFT_WEIGHTS_NAME
    with config_path.open("rb") as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)  # `_parse` refuses what is longer
    values = _parse(config_path, content)
    if values.get("peft_type") != ETHER:
        raise EtherFileError(f"{folder} holds a PEFT adapter of type {values.get('peft_type')!r}, not {ETHER.value!r}")
    config = _build_config(str(config_path), values)
    tensors, _ = _open(weights_path)
    if not tensors:
        raise EtherFileError(f"{weights_path} holds no vectors")
    vectors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if len(vectors) < len(tensors):
        raise EtherFileError(f"{weights_path} holds a vector twice, with and without 'base_model.model.' before it")
    _check_vectors(str(weights_path), config, vectors)
    return AdapterFile({None: config}, {None: vectors}, source=str(folder))


def from_state_dict(tensors: Mapping[str, Tensor]) -> AdapterFile:
    """A checkpoint from `<component>.<module path>.<vector>` tensors; method, sides and blocks are read off them.

    Raises:
        EtherFileError: a key of another form, vectors that do not belong together, or none at all.
    """
    parts = _split_components("state dict", tensors)
    configs = {}
    for component, vectors in parts.items():
        where = f"state dict: {component}"
        names = {key.rpartition(".")[2] for key in vectors}
        first = next(iter(vectors.values()))
        configs[component] = _build_config(
            where,
            {
                "method": "ether_plus" if "ether_v" in names else "ether",
                "sides": "both" if "ether_u_out" in names else "input",
                "num_blocks": first.shape[0] if first.ndim == 2 and first.shape[0] else 1,
                "target_modules": sorted({key.rpartition(".")[0] for key in vectors}),
            },
        )
        _check_vectors(where, configs[component], vectors)
    return AdapterFile(configs, parts)
