"""Adapter files taken apart, put together again, honest or not, and spoilt in every way that one can think of."""

import json
import math
import pickle
import re
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

from ether_diffusion.adapters.reading import MAX_DOCUMENT_BYTES
from ether_diffusion.adapters.schema import digest

MEGABYTE = 1 << 20

Tensors = dict[str, torch.Tensor]
Header = dict[str, Any]


# Taking files apart and putting them together, honest or not ----------------------------------------------------


def split(content: bytes) -> tuple[Header, bytes]:
    """The header, as JSON, and the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def sign(tensors: Tensors, document: str) -> bytes:
    """A file whose digest is right, whatever it holds."""
    return save(tensors, {"format": "pt", "ether": document, "sha256": digest(tensors, document)})


def take_apart(content: bytes) -> tuple[Tensors, dict[str, str]]:
    return load(content), split(content)[0].get("__metadata__", {})


def put_together(rng: Random, tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """Signed again three times in four; a file without our metadata stays without."""
    if "ether" in metadata and rng.random() < 0.75:
        return sign(tensors, metadata["ether"])
    return save(tensors, metadata)


def junk(rng: Random, depth: int = 0) -> Any:
    """A JSON value that nobody expects."""
    leaves = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        math.nan,
        "",
        "\x1b[31m\n",
        "../../etc/passwd",
        "é" * 50,
        "(a+)+$",
        "ether",
    ]
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(leaves)
    values = [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if rng.random() < 0.5 else {str(rng.choice(leaves)): value for value in values}


# Mutations: a generator of random numbers and a good file to a bad one -------------------------------------------


def truncate(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def flip_bits(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    within = rng.choice([8, 500, len(content)])  # the length, the header, all
    for _ in range(rng.choice([1, 1, 8])):
        changed[rng.randrange(min(within, len(content)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_a_stretch(rng: Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    stretch = rng.randbytes(rng.randrange(1, 64)) if rng.random() < 0.5 else bytes(64)
    return content[:start] + stretch + content[start + len(stretch) :]


def append(rng: Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 100))


def lie_about_the_header(rng: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    claims = [0, 1, length - 1, length + 1, len(content) - 8, len(content), 100 * MEGABYTE, 2**40, 2**63, 2**64 - 1]
    return rng.choice(claims).to_bytes(8, "little") + content[8:]


def lie_in_the_header(rng: Random, content: bytes) -> bytes:
    header, data = split(content)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    lies = {
        "dtype": ["F64", "F16", "BF16", "I64", "BOOL", "F8_E5M2", "F4", "C64", "Q9", 7, None],
        "shape": [
            [],
            [0],
            [2**62, 4],
            [2**32, 2**32],
            [-1, 8],
            [1] * 5000,
            [8, 2],
            [16],
            ["2", 8],
            [2.5, 8],
            {},
            None,
        ],
        "data_offsets": [[0, 0], [0, 2**63], [64, 0], [0, 10**15], [-64, 0], [0], [0, 64], [], "0", None],
    }
    entry[field] = rng.choice(lies[field])
    if rng.random() < 0.2:
        del entry[field]
    return join(header, data)


def swap_keys(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    one, other = rng.sample(sorted(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return put_together(rng, tensors, metadata)


def remove_keys(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    for key in rng.sample(sorted(tensors), rng.choice([1, 2, len(tensors) // 2, len(tensors)])):
        del tensors[key]
    return put_together(rng, tensors, metadata)


def rename_a_key(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    key = rng.choice(sorted(tensors))
    new = rng.choice(
        [
            "", ".", "..", "unet", "unet.ether_u", ".ether_u", "x" * 10_000 + ".ether_u", "../../x.ether_u", "\x1b[2J",
            key.replace("to_q", "to_query"), key.replace("unet", "vae"), key.replace("text_model.", ""),
            key.replace("ether_u", "ether_v"), key.replace("ether_u", "lora_A"), "unet.down_blocks.ether_u",
            re.sub(r"attn\d\.to_\w+(\.0)?", "norm1", key), "unet.conv_in.ether_u", "unet.mid_block.ether_u",
            key.replace("attn1", "attn2"), f"unet.{key}", key.upper(), key.replace("to_k.", "to_k.base_layer."),
        ]
    )  # fmt: skip
    tensor = tensors[key] if rng.random() < 0.3 else tensors.pop(key)
    tensors[new] = tensor.clone()
    return put_together(rng, tensors, metadata)


def reshape(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    key = rng.choice(sorted(tensors))
    old = tensors[key]
    shapes = [
        old.mT if old.ndim > 1 else old.reshape(1, -1),
        old.flatten(),
        old[None],
        old[..., :-1],
        old[:1],
        old[:0],
        torch.cat([old, old]),
        old.flatten()[0],
        old.repeat(*[1] * (old.ndim - 1), 3),
    ]
    tensors[key] = rng.choice(shapes).clone().contiguous()
    return put_together(rng, tensors, metadata)


def recast(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
    dtype = rng.choice([*dtypes, torch.complex64])
    for key in rng.sample(sorted(tensors), rng.choice([1, len(tensors)])):
        tensors[key] = tensors[key].to(dtype)
    return put_together(rng, tensors, metadata)


def change_numbers(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    number = rng.choice([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-31, 1e-20, 3.0, 1e20, 3.4e38])
    for key in rng.sample(sorted(tensors), rng.choice([1, len(tensors)])):
        places = tuple(rng.choice([slice(None), rng.randrange(length)]) for length in tensors[key].shape)
        tensors[key][places] = number
    return put_together(rng, tensors, metadata)


def change_the_document(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    if "ether" not in metadata:
        return truncate(rng, content)
    document = json.loads(metadata["ether"])
    targets = [document, document["configs"], *document["configs"].values(), document["base_fingerprint"]]
    if weights := document.get("weights"):
        targets += [weights, *weights.values(), weights["control_encoder"]["config"]]
    target = rng.choice(targets)
    key = rng.choice([*target, "a_new_key"])
    if rng.random() < 0.2:
        target.pop(key, None)
    else:
        target[key] = junk(rng)
    return put_together(rng, tensors, metadata | {"ether": json.dumps(document)})


def replace_the_document(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    texts = ["", "{", "[]", "null", "{}", "[" * 5000, "9" * 5000, json.dumps(junk(rng)), '{"format_version": 1e999}']
    return sign(tensors, rng.choice(texts)) if metadata else save(tensors, {"ether": rng.choice(texts)})


def blow_up_the_metadata(rng: Random, content: bytes) -> bytes:
    tensors, metadata = take_apart(content)
    size = rng.choice([10_000, MAX_DOCUMENT_BYTES + 1, 5 * MEGABYTE])
    filler = rng.choice(['"x"', '[[],{"a":{}}]', "7"])
    text = metadata.get("ether", "{}")[:-1] + ', "filler": [' + ",".join([filler] * (size // (len(filler) + 1))) + "]}"
    return sign(tensors, text) if rng.random() < 0.8 else save(tensors, metadata | {"filler": "x" * size})


def pickle_it(rng: Random, content: bytes) -> bytes:
    return pickle.dumps(load(content), protocol=rng.choice([0, 2, 5]))


def replace_by_noise(rng: Random, content: bytes) -> bytes:
    return rng.randbytes(rng.randrange(200))


MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (
    truncate, flip_bits, overwrite_a_stretch, append, lie_about_the_header, lie_in_the_header, swap_keys, remove_keys,
    rename_a_key, reshape, recast, change_numbers, change_the_document, replace_the_document, blow_up_the_metadata,
    pickle_it, replace_by_noise,
)  # fmt: skip


def mutate_config(rng: Random, content: bytes) -> bytes:
    """PEFT's adapter_config.json, which has neither version nor digest."""
    if rng.random() < 0.3:
        return rng.choice([truncate, flip_bits, overwrite_a_stretch, replace_by_noise])(rng, content)
    values = json.loads(content)
    values[rng.choice(sorted(values))] = junk(rng)
    return json.dumps(values).encode()
