"""Files that somebody made to do harm, or that a disk spoilt: thousands of them, each refused or loaded right."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.bounds import within_bounds
from helpers.pipelines import adapt, assert_unchanged, open_pipeline, snapshot
from helpers.spoilt_files import MUTATIONS, Tensors, join, mutate_config, sign, take_apart
from peft import get_peft_model

from ether_diffusion import ControlEncoder, EtherConfig, EtherControlPipeline
from ether_diffusion.adapters.reading import MAX_DOCUMENT_BYTES, MAX_DOCUMENT_VALUES, read_adapter_file
from ether_diffusion.adapters.schema import MAX_TENSORS, MAX_WEIGHT, MAX_WIDTH, WEIGHTS_NAME, canonical_path, digest
from ether_diffusion.adapters.writing import collect
from ether_diffusion.errors import EtherFileError

# Loading them ---------------------------------------------------------------------------------------------------


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
