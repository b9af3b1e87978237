"""Files that somebody made to do harm, or that a disk spoilt: thousands of them, each refused or loaded right."""

import json
import math
import pickle
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.pipelines import adapt, assert_unchanged, open_pipeline, snapshot
from peft import get_peft_model
from safetensors.torch import load, save

from ether_diffusion import ControlEncoder, EtherConfig, EtherControlPipeline
from ether_diffusion.adapters.reading import MAX_DOCUMENT_BYTES, MAX_DOCUMENT_VALUES, read_adapter_file
from ether_diffusion.adapters.schema import MAX_TENSORS, MAX_WEIGHT, MAX_WIDTH, WEIGHTS_NAME, canonical_path, digest
from ether_diffusion.adapters.writing import collect
from ether_diffusion.errors import EtherFileError

MEGABYTE = 1 << 20
SECONDS = 10
"""Of computing: a load that takes longer hangs."""
ALLOWANCE = 8 * MEGABYTE
"""Memory that a load may take besides twice the file: Python's objects, the pools of PyTorch and of malloc."""
TENSOR = 2048
"""And for each tensor of a file of many: its objects in Python and PyTorch, where no freed memory lies ready."""

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


# Loading them ---------------------------------------------------------------------------------------------------


@contextmanager
def within_bounds(size: int, tensors: int = 0) -> Iterator[None]:
    """Computing time and memory for loading a file of `size` bytes and many `tensors`: past either, what runs fails.

    The memory is what the process has of its own: maps of a file that are only read from do not count.
    """

    def give_up(*_):
        raise TimeoutError(f"still loading after {SECONDS} seconds")

    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmData:")[2].split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    earlier = signal.signal(signal.SIGPROF, give_up)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * size + ALLOWANCE + TENSOR * tensors, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, earlier)


def canonical(vectors: Tensors) -> Tensors:
    """Vectors by the name that a file of ours would give them, in float32."""
    named = {}
    for key, vector in vectors.items():
        component, _, path = key.partition(".")
        named[f"{component}.{canonical_path(component, path)}"] = vector.float()
    return named


def assert_holds(pipe, vectors: Tensors) -> None:
    loaded, wanted = pipe.ether_state_dict(), canonical(vectors)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], vector) for key, vector in wanted.items())
    assert all(torch.isfinite(vector).all() and (vector != 0).any(-1).all() for vector in loaded.values())


@pytest.fixture
def good_sources(tmp_path, tiny_pipeline_folder) -> list[Path]:
    """An adapter of each method as a file of ours, and one as a folder of PEFT."""
    sources = []
    for method in ("ether", "ether_plus"):
        pipe = adapt(open_pipeline(tiny_pipeline_folder), method, num_blocks=2)
        sources.append(pipe.save_ether_weights(tmp_path / method, metadata={"prompt": "a photo of sks dog"}))
    unet = open_pipeline(tiny_pipeline_folder).unet
    get_peft_model(unet, EtherConfig(num_blocks=2)).save_pretrained(tmp_path / "peft")
    return [*sources, tmp_path / "peft"]


def load_mutated_files(pipe, sources: list[Path], count: int) -> dict[str, int]:
    """Load `count` mutated files; returns how many were refused and how many loaded."""
    before, outcomes = snapshot(pipe), {"refused": 0, "loaded": 0}
    good = {
        path: path.read_bytes() for source in sources for path in ([source] if source.is_file() else source.iterdir())
    }
    for number in range(count):
        rng = Random(number)
        source = sources[number % len(sources)]
        path, mutate = source, MUTATIONS[number // len(sources) % len(MUTATIONS)]
        if source.is_dir():
            of_config = rng.random() < 0.4
            path = source / ("adapter_config.json" if of_config else "adapter_model.safetensors")
            mutate = mutate_config if of_config else mutate
        bad = mutate(rng, good[path])
        path.write_bytes(bad)
        what = f"file {number}, {mutate.__name__} of {path.name}"
        try:
            with within_bounds(len(bad)):
                pipe.load_ether_weights(source, "mutated")
        except EtherFileError as error:
            assert str(source) in str(error) and str(error).isprintable(), what
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}") from error
        else:
            weights = path if source.is_file() else source / "adapter_model.safetensors"
            vectors, metadata = take_apart(weights.read_bytes())
            assert source.is_dir() or metadata["sha256"] == digest(vectors, metadata["ether"]), what
            assert_holds(pipe, {key.replace("base_model.model", "unet"): vector for key, vector in vectors.items()})
            pipe.unload_ether_weights()
            outcomes["loaded"] += 1
        assert_unchanged(pipe, before)
        path.write_bytes(good[path])
    return outcomes


def test_two_hundred_mutated_files_load_right_or_are_refused_and_change_nothing(tiny_pipeline, good_sources):
    outcomes = load_mutated_files(tiny_pipeline, good_sources, 204)
    assert outcomes["refused"] > 120
    assert outcomes["loaded"] > 10


# Weights that are held whole -------------------------------------------------------------------------------------


@pytest.fixture
def good_whole(tmp_path, tiny_pipeline_folder) -> Path:
    """An adapter with vectors, a control encoder, and two modules of the UNet as they are."""
    pipe = adapt(open_control_pipeline(tiny_pipeline_folder), num_blocks=2)
    encoder = ControlEncoder(16, block_out_channels=(4, 8))
    torch.nn.init.normal_(encoder.embedding.conv_out.weight)
    pipe.add_control("default", encoder)
    return pipe.save_ether_weights(tmp_path / "whole", replaced_modules={"unet": ["conv_out", "conv_norm_out"]})


def open_control_pipeline(folder) -> EtherControlPipeline:
    return EtherControlPipeline.from_pipe(open_pipeline(folder))


def load_mutated_wholes(pipe: EtherControlPipeline, path: Path, count: int) -> dict[str, int]:
    """As `load_mutated_files`, of a file with whole weights."""
    before, good, outcomes = snapshot(pipe), path.read_bytes(), {"refused": 0, "loaded": 0}
    for number in range(count):
        rng, mutate = Random(number), MUTATIONS[number % len(MUTATIONS)]
        bad = mutate(rng, good)
        path.write_bytes(bad)
        what = f"file {number}, {mutate.__name__}"
        try:
            with within_bounds(len(bad)):
                pipe.load_ether_weights(path, "mutated")
        except EtherFileError as error:
            assert str(path) in str(error) and str(error).isprintable(), what
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}") from error
        else:
            held = collect(pipe, "mutated")
            loaded = {f"{part}.{key}": t for part, own in held.tensors.items() for key, t in own.items()}
            loaded |= {f"{part}.{key}": t for part, own in held.weights.items() for key, t in own.tensors.items()}
            wanted = canonical(take_apart(bad)[0])
            assert loaded.keys() == wanted.keys(), what
            assert all(torch.equal(loaded[key].float(), tensor) for key, tensor in wanted.items()), what
            assert all(torch.isfinite(tensor).all() for tensor in loaded.values()), what
            pipe.unload_ether_weights()
            outcomes["loaded"] += 1
        assert_unchanged(pipe, before)
        assert not pipe.controls, what
    return outcomes


def test_mutated_files_with_whole_weights_load_right_or_are_refused(tiny_pipeline_folder, good_whole):
    outcomes = load_mutated_wholes(open_control_pipeline(tiny_pipeline_folder), good_whole, 102)
    assert outcomes["refused"] > 70
    assert outcomes["loaded"] > 4


@pytest.mark.slow
def test_a_thousand_mutated_files_with_whole_weights(tiny_pipeline_folder, good_whole):
    outcomes = load_mutated_wholes(open_control_pipeline(tiny_pipeline_folder), good_whole, 1020)
    assert outcomes["refused"] > 700
    assert outcomes["loaded"] > 40


def _set(document: dict, path: str, value: Any) -> None:
    *steps, last = path.split("/")
    for step in steps:
        document = document[step]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("weights/control_encoder/config/out_channels", 17, r"conv_out.* has shape \(16, .* needs \(17,"),
        ("weights/control_encoder/config/out_channels", 1 << 40, "out_channels: got .* less than or equal to 16384"),
        ("weights/control_encoder/config/out_channels", True, "out_channels: got True: needs a valid integer"),
        ("weights/control_encoder/config/block_out_channels", [4] * 5000, "at most 8 items"),
        ("weights/control_encoder/config/block_out_channels", [4, 8, 8], "embedding.blocks.2.bias is missing"),
        ("weights/control_encoder/config/block_out_channels", [4], "blocks.0.bias is no weight of a control encoder"),
        ("weights/control_encoder/config/interpolation", "cubic", "interpolation: got 'cubic': needs"),
        ("weights/control_encoder/config/interpolation", [], "interpolation: got"),
        ("weights/control_encoder/config/value_range", [1.0, 0.0], "value_range: got"),
        ("weights/control_encoder/config/value_range", [0.0], "value_range: got"),
        ("weights/control_encoder/config/value_range", "0,1", "value_range: got"),
        ("weights/control_encoder/config/path", "/etc/passwd", "config.path: is nothing that this release knows"),
        ("weights/control_encoder", {"modules": ["embedding"]}, "config is missing"),
        ("weights/unet", {"config": {}}, "modules is missing"),
        ("weights/unet", ["conv_out"], "weights.unet: got .* needs a valid dictionary"),
        ("weights/unet/modules", ["conv_out"], "conv_norm_out.* is in none of the modules"),
        ("weights/unet/modules", ["conv_out", "conv_norm_out", "conv_in"], "conv_in is listed, but there are no"),
        ("weights/unet/modules", ["conv_out", "conv_out", "conv_norm_out"], "each module is listed once"),
        ("weights/unet/modules", [f"m{k}" for k in range(15000)], "at most 256 items"),
        ("weights/unet/modules", [""], "modules.0: got .* at least 1 character"),
        ("weights/unet/modules", 7, "modules: got 7: needs a valid list"),
        ("weights/a.b", {"modules": ["c"]}, "'a.b' is not the name of a component"),
        ("weights/vae", {"modules": ["encoder"]}, "encoder is listed, but there are no weights"),
        ("weights", {f"c{k}": {} for k in range(4000)}, r"\(blocks, width\) fits"),
        ("weights", [], "weights: got .* needs a valid dictionary"),
        ("format_version", 1, r"fits, with|has shape .*\(blocks, width\) fits"),
        ("format_version", 3, "newer release"),
    ],
)
def test_a_document_that_lies_about_whole_weights_is_refused(tiny_pipeline_folder, good_whole, path, value, message):
    tensors, metadata = take_apart(good_whole.read_bytes())
    document = json.loads(metadata["ether"])
    _set(document, path, value)
    good_whole.write_bytes(sign(tensors, json.dumps(document)))
    size = good_whole.stat().st_size
    with within_bounds(size), pytest.raises(EtherFileError, match=message):
        read_adapter_file(good_whole)


def make_whole(name: str, tensor: torch.Tensor) -> bytes:
    about = {"unet": {"modules": ["conv_out"]}}
    return sign({name: tensor}, json.dumps({"format_version": 2, "configs": {}, "weights": about}))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 1, 1, 1, 1), "one to four axes"),
        (torch.zeros(()), "one to four axes"),
        (torch.zeros(0, 4), "none of length 0"),
        (torch.zeros(MAX_WEIGHT + 1, dtype=torch.float16), f"{MAX_WEIGHT} numbers at most"),
        (torch.full((3,), math.inf), "finite numbers"),
        (torch.tensor([1.0, math.nan]).bfloat16(), "finite numbers"),
        (torch.zeros(3, dtype=torch.int64), "made of I64; F16, BF16, F32, F64 fit"),
    ],
)
def test_a_whole_tensor_that_no_module_has_is_refused(tmp_path, tensor, message):
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(make_whole("unet.conv_out.weight", tensor))
    with within_bounds(path.stat().st_size), pytest.raises(EtherFileError, match=message):
        read_adapter_file(path)


def test_a_whole_tensor_at_the_limit_is_read_in_twice_its_size(tmp_path):
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(make_whole("unet.conv_out.weight", torch.zeros(MAX_WEIGHT, dtype=torch.float16)))
    with within_bounds(path.stat().st_size):
        read_adapter_file(path)


@pytest.mark.slow
def test_thousands_of_mutated_files_load_right_or_are_refused_and_change_nothing(tiny_pipeline, good_sources):
    outcomes = load_mutated_files(tiny_pipeline, good_sources, 2550)
    assert outcomes["refused"] > 1500
    assert outcomes["loaded"] > 100


def make_vectors(count: int, width: int) -> Tensors:
    return {f"unet.{k}.ether_u": torch.ones(1, width) for k in range(count)}


def make_document(**fields: Any) -> str:
    return json.dumps({"format_version": 1, "configs": {"unet": {"method": "ether"}}} | fields)


@pytest.mark.parametrize(
    ("content", "tensors"),
    [
        pytest.param(lambda: sign(make_vectors(512, 1 << 14), make_document()), 0, id="32 MB of vectors"),
        pytest.param(lambda: sign(make_vectors(32, MAX_WIDTH), make_document()), 0, id="the widest vectors"),
        pytest.param(lambda: sign(make_vectors(MAX_TENSORS, 1), make_document()), MAX_TENSORS, id="the most vectors"),
        pytest.param(
            lambda: sign(make_vectors(1, 4), make_document(filler=[{"a": {}}] * (MAX_DOCUMENT_VALUES // 4))),
            0,
            id="the most values",
        ),
        pytest.param(
            lambda: sign(make_vectors(1, 4), make_document(filler="x" * (MAX_DOCUMENT_BYTES - 1000))),
            0,
            id="the longest document",
        ),
    ],
)
def test_a_file_at_the_limits_is_read_in_twice_its_size(tmp_path, content, tensors):
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(content())
    with within_bounds(path.stat().st_size, tensors):
        read_adapter_file(path)


@pytest.mark.parametrize(
    ("content", "tensors"),
    [
        pytest.param(lambda: sign(make_vectors(MAX_TENSORS + 1, 1), make_document()), MAX_TENSORS, id="many vectors"),
        pytest.param(lambda: sign(make_vectors(1, 4), make_document(filler=[{}] * 300_000)), 0, id="many values"),
        pytest.param(
            lambda: join({"a": {"dtype": "F32", "shape": [1] * 1_300_000, "data_offsets": [0, 4]}}, bytes(4)),
            0,
            id="a shape of a million axes",
        ),
        pytest.param(
            lambda: join({"a": {"dtype": "F32", "shape": [1, 2**60], "data_offsets": [0, 2**62]}}, bytes(4)),
            0,
            id="a vector of four exabytes",
        ),
        pytest.param(lambda: sign({"unet.a.weight": torch.zeros(8 << 20)}, make_document()), 0, id="a large matrix"),
    ],
)
def test_a_file_that_would_take_more_memory_is_refused_in_twice_its_size(tmp_path, content, tensors):
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(content())
    with within_bounds(path.stat().st_size, tensors), pytest.raises(EtherFileError, match=WEIGHTS_NAME):
        read_adapter_file(path)
