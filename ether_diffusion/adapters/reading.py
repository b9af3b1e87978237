"""Read adapter files: ours, PEFT's folders, and state dicts. Nothing is believed before it is checked."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ether_diffusion.adapters.entries import validated
from ether_diffusion.adapters.schema import (
    MAX_TENSORS,
    AdapterFile,
    ConfigEntry,
    build_config,
    check_entry,
    check_total,
    check_vectors,
    check_weights,
    digest,
    is_module_weight,
    read_document,
    split_components,
)
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.config import ETHER

PEFT_WEIGHTS_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_HEADER_BYTES = 4 << 20
MAX_DOCUMENT_BYTES = 1 << 20
READ_WHOLE = 1 << 21  # bytes of a file up to which it is read into memory, and not mapped
MAX_DOCUMENT_VALUES = 20_000
MAX_HEADER_VALUES = 8 * MAX_TENSORS + MAX_DOCUMENT_VALUES  # eight to an entry: name, type, two sizes, two offsets, …


def is_pickle_by_name(path: str | Path) -> bool:
    """Whether a file is a pickle by its name; pickles run code when they are read, so none is."""
    return Path(path).suffix.lower() in PICKLE_SUFFIXES


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
    return interpret(str(path), tensors, header["ether"])


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
    # PEFT's own fields are no business of ours; they differ from release to release.
    known = {name: value for name, value in values.items() if name in ConfigEntry.model_fields}
    config = build_config(str(config_path), validated(ConfigEntry, str(config_path), known))
    tensors, _ = _open(weights_path)
    if not tensors:
        raise EtherFileError(f"{weights_path} holds no vectors")
    vectors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if len(vectors) < len(tensors):
        raise EtherFileError(f"{weights_path} holds a vector twice, with and without 'base_model.model.' before it")
    check_vectors(str(weights_path), config, vectors)
    return AdapterFile({None: config}, {None: vectors}, source=str(folder))


def from_state_dict(tensors: Mapping[str, Tensor]) -> AdapterFile:
    """An adapter from `<component>.<module path>.<vector>` tensors; method, sides and blocks are read off them.

    Raises:
        EtherFileError: a key of another form, vectors that do not belong together, or none at all.
    """
    parts = split_components("state dict", tensors)
    configs = {}
    for component, vectors in parts.items():
        where = f"state dict: {component}"
        names = {key.rpartition(".")[2] for key in vectors}
        first = next(iter(vectors.values()))
        entry = ConfigEntry(
            method="ether_plus" if "ether_v" in names else "ether",
            sides="both" if "ether_u_out" in names else "input",
            num_blocks=first.shape[0] if first.ndim == 2 and first.shape[0] else 1,
            target_modules=sorted({key.rpartition(".")[0] for key in vectors}),
        )
        configs[component] = build_config(where, entry)
        check_vectors(where, configs[component], vectors)
    return AdapterFile(configs, parts)


def interpret(where: str, tensors: Mapping[str, Tensor], text: str) -> AdapterFile:
    """The adapter that tensors and a document of a pipeline file make up.

    Raises:
        EtherFileError: whatever is wrong with them without a look at a pipeline.
    """
    values = _parse(f"{where}: the metadata", text.encode())
    document = read_document(where, values)
    of_modules = {name: tensor for name, tensor in tensors.items() if is_module_weight(name, document.weights)}
    vectors = {name: tensor for name, tensor in tensors.items() if name not in of_modules}
    parts = split_components(where, vectors) if vectors or not of_modules else {}
    if set(document.configs) != set(parts):
        raise EtherFileError(
            f"{where}: there are vectors for {sorted(parts)}, but configs for {sorted(document.configs)}"
        )
    configs = {}
    for component, entry in document.configs.items():
        configs[component] = build_config(f"{where}: {component}", entry)
        check_vectors(f"{where}: {component}", configs[component], parts[component])
    by_component: dict[str, dict[str, Tensor]] = {component: {} for component in document.weights}
    for name, tensor in of_modules.items():
        component, _, key = name.partition(".")
        by_component[component][key] = tensor
    check_total(where, sum(tensor.numel() for tensor in of_modules.values()))
    weights = {
        component: check_weights(f"{where}: {component}", component, document.weights[component], own)
        for component, own in by_component.items()
    }
    return AdapterFile(configs, parts, values, where, weights)


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


def _count_values(text: bytes) -> int:
    """About how many values there are in JSON, without parsing it."""
    return sum(map(text.count, (b"[", b"{", b",")))


# Safetensors ----------------------------------------------------------------------------------------------------


def check_start(path: Path) -> None:
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
    """All tensors and the metadata of a safetensors file whose metadata has the key `needs`.

    Raises:
        EtherFileError: anything but a complete safetensors file of vectors: no data is read before the header is
            checked.
    """
    try:
        header = _check_header(path, needs)
        return read_tensors(path), header
    except EtherFileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise EtherFileError(f"{path} is not a whole safetensors file (cut short or damaged): {error}") from error


def _check_header(path: Path, needs: str | None) -> dict[str, str]:
    """The metadata of a safetensors file whose header was checked; no map of its data outlives this."""
    check_start(path)
    with safe_open(path, "np") as file:
        header, names = file.metadata() or {}, file.keys()
        if needs is not None and needs not in header:
            raise EtherFileError(
                f"{path} is a safetensors file, but holds no ETHER adapter (no {needs!r} in its metadata)"
            )
        if len(names) > MAX_TENSORS:
            raise EtherFileError(f"{path} holds {len(names)} tensors; an adapter has {MAX_TENSORS} at most")
        components, total = _components_with_modules(header.get("ether", "")) if needs == "ether" else (), 0
        for name in names:
            entry, of_module = file.get_slice(name), is_module_weight(name, components)
            check_entry(f"{path}: {name}", entry.get_dtype(), entry.get_shape(), of_module)
            total += math.prod(entry.get_shape()) if of_module else 0
        check_total(str(path), total)
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose header was checked; those of a large one are mapped from the disk.

    What is mapped leaves two integers behind in memory for each tensor (safetensors 0.8), which grows where adapters
    are read again and again, as in a server.
    """
    if path.stat().st_size <= READ_WHOLE:
        return dict(sorted(load(path.read_bytes()).items()))  # else their order is another one every time
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _components_with_modules(text: str) -> Collection[str] | None:
    """The components of which a document says that the file holds modules; None: the document is broken."""
    try:
        return read_document("", _parse("", text.encode())).weights
    except EtherFileError:
        return None  # `interpret` says what is wrong with it, once the digest has shown that nothing is damaged
