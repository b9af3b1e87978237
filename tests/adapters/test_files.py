"""The file: what is written comes back, and what is damaged, foreign or malicious is refused by name."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.adapter_files import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.locate import HubSource, find_adapter_file
from ether_diffusion.adapters.reading import (
    MAX_DOCUMENT_BYTES,
    MAX_DOCUMENT_VALUES,
    MAX_HEADER_BYTES,
    from_state_dict,
    read_adapter_file,
)
from ether_diffusion.adapters.schema import (
    FORMAT_VERSION,
    MAX_TENSORS,
    MAX_WIDTH,
    WEIGHTS_NAME,
    canonical_path,
    digest,
)
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.transforms import SMALLEST_LENGTH


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(target_modules=["to_q"])))
    return path


def rewrite(path: Path, change) -> None:
    """Change a file's document and sign it again, as a forger would."""
    with safe_open(path, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        document = json.loads(opened.metadata()["ether"])
    change(document, tensors)
    text = json.dumps(document)
    save_file(tensors, path, {"format": "pt", "ether": text, "sha256": digest(tensors, text)})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["ether", "ether_plus"]),
    blocks=st.integers(1, 4),
    component=st.sampled_from(["unet", "transformer", "text_encoder", "controlnet"]),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_what_is_written_comes_back_bit_for_bit(tmp_path, method, blocks, component, layers, seed):
    config = EtherConfig(method=method, num_blocks=blocks, target_modules=["to_q"])
    written = make_checkpoint(config, component, layers, seed)
    write_adapter_file(tmp_path / WEIGHTS_NAME, written)
    read = read_adapter_file(tmp_path / WEIGHTS_NAME)
    assert read.tensors.keys() == written.tensors.keys()
    for key, tensor in written.tensors[component].items():
        assert torch.equal(read.tensors[component][key], tensor)
    assert (read.configs[component].method, read.configs[component].num_blocks) == (method, blocks)
    assert read.configs[component].sides == config.sides
    assert read.metadata["prompt"] == "a photo of sks dog"
    assert read.metadata["format_version"] == 1  # what has vectors alone can be read by every release


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_never_loads(tmp_path, data):
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(target_modules=["to_q"]), layers=1))
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(EtherFileError, match="ether"):
        read_adapter_file(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(target_modules=["to_q"]), layers=1))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(EtherFileError, match=f"{WEIGHTS_NAME} is not a whole safetensors file"):
        read_adapter_file(path)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "adapter.ckpt", "adapter.pkl", "ADAPTER.PTH"])
def test_a_pickle_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(EtherFileError, match=f"{name} is a pickle by its name"):
        find_adapter_file(tmp_path / name)


def test_a_pickle_that_calls_itself_safetensors_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EtherFileError, match="holds a pickle, whatever its name says"):
        read_adapter_file(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(EtherFileError, match="holds a pickle, whatever its name says"):
        read_adapter_file(path)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_with_a_pickle_alone_says_so(tmp_path):
    (tmp_path / "pytorch_ether_weights.bin").write_bytes(b"\x80\x04")
    with pytest.raises(EtherFileError, match="pytorch_ether_weights.bin: pickles are not read"):
        find_adapter_file(tmp_path)


def test_another_safetensors_file_is_not_taken_for_an_adapter(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EtherFileError, match="holds no ETHER adapter"):
        find_adapter_file(tmp_path / "model.safetensors")


def test_a_newer_format_asks_for_an_upgrade(file):
    rewrite(file, lambda document, tensors: document.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(EtherFileError, match="newer release .* upgrade ether-diffusion"):
        read_adapter_file(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.pop("format_version"), "format_version is missing"),
        (lambda d, t: d.update(configs={}), "but configs for"),
        (lambda d, t: d.update(format_version=0), "format_version: got 0: needs"),
        (lambda d, t: d.update(format_version=True), "format_version: got True: needs"),
        (lambda d, t: d.update(configs=[]), "configs: got "),
        (lambda d, t: d.update(configs=3), "configs: got 3"),
        (
            lambda d, t: d["configs"]["unet"].update(target_modules=5),
            "configs.unet.target_modules: got 5.* list or .* string",
        ),
        (lambda d, t: d["configs"]["unet"].update(exclude_modules=[["a"]]), "configs.unet.exclude_modules.0: got"),
        (lambda d, t: d["configs"]["unet"].update(layers_to_transform="all"), "layers_to_transform: got 'all'"),
        (lambda d, t: d["configs"].update(unet=3), "configs.unet: got 3.* dictionary"),
        (lambda d, t: d["configs"]["unet"].update(method="lora"), "method='lora'"),
        (lambda d, t: d["configs"]["unet"].update(num_blocks=0), "num_blocks=0"),
        (lambda d, t: d["configs"]["unet"].update(bias="all"), "bias='all'"),
        (lambda d, t: d["configs"]["unet"].update(sides=[]), "configs.unet.sides: got "),
        (
            lambda d, t: d["configs"]["unet"].update(reflections=2),
            "configs.unet.reflections: is nothing that this release knows",
        ),
        (lambda d, t: d.update(base_model=["x"]), "base_model: got .'x'.: needs a valid string"),
        (lambda d, t: d.update(base_fingerprint={"unet": 3}), "base_fingerprint.unet: got 3"),
        (lambda d, t: d.update(base_fingerprint=[]), "base_fingerprint: got"),
        (lambda d, t: d.update(versions={"torch": 2}), "versions.torch: got 2: needs a valid string"),
        (lambda d, t: d.update(notes="x" * MAX_DOCUMENT_BYTES), f"at most {MAX_DOCUMENT_BYTES}"),
        (lambda d, t: d.update(notes=[{}] * MAX_DOCUMENT_VALUES), "values; at most"),
        (lambda d, t: t.update({"unet.weight": torch.zeros(2, 2)}), "not of the form"),
        (lambda d, t: t.clear(), "holds no vectors"),
    ],
)
def test_a_document_that_makes_no_sense_is_refused(file, change, message):
    rewrite(file, change)
    with pytest.raises(EtherFileError, match=f"{WEIGHTS_NAME}.*{message}"):
        read_adapter_file(file)


KEY = "unet.mid.0.to_q.ether_u"


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({KEY: torch.tensor(1.0)}, r"mid.0.to_q.ether_u has shape \(\); \(blocks, width\) fits"),
        ({KEY: torch.ones(4)}, r"has shape \(4,\)"),
        ({KEY: torch.ones(1, 0)}, r"has shape \(1, 0\)"),
        ({KEY: torch.ones(1, MAX_WIDTH + 1)}, f"with {MAX_WIDTH} numbers at most"),
        ({KEY: torch.ones(2, 4)}, r"mid.0.to_q.ether_u has shape \(2, 4\), but num_blocks=1 needs \(1, width / 1\)"),
        ({KEY: torch.ones(1, 4, dtype=torch.int32)}, "mid.0.to_q.ether_u is made of I32; F16, BF16, F32, F64 fit"),
        ({KEY: torch.ones(1, 4).to(torch.float8_e4m3fn)}, "is made of F8_E4M3"),
        ({KEY: torch.ones(1, 4, dtype=torch.complex64)}, "is made of C64"),
        ({KEY: torch.tensor([[1, 2, float("nan"), 4]])}, "mid.0.to_q.ether_u is not made of finite"),
        ({KEY: torch.full((1, 4), float("inf"))}, "is not made of finite"),
        ({KEY: torch.full((1, 4), 1e300, dtype=torch.float64)}, "is not made of finite"),
        ({KEY: torch.zeros(1, 4)}, "mid.0.to_q.ether_u has no direction in block 0 of 1"),
        ({KEY: torch.full((1, 4), SMALLEST_LENGTH / 4)}, "has no direction"),
        ({KEY: torch.full((1, 4), 3e38)}, "has no direction"),
        ({"unet.mid.0.to_q.ether_v": torch.ones(1, 4)}, "ether_v does not belong to ether with sides='input'"),
        ({f"unet.extra{k}.ether_u": torch.ones(1, 1) for k in range(MAX_TENSORS)}, f"has {MAX_TENSORS} at most"),
    ],
)
def test_a_vector_that_cannot_be_one_is_refused_by_file_and_key(file, vectors, message):
    rewrite(file, lambda document, tensors: tensors.update(vectors))
    with pytest.raises(EtherFileError, match=f"{WEIGHTS_NAME}.*{message}"):
        read_adapter_file(file)


def test_the_block_without_a_direction_is_named(tmp_path):
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(num_blocks=3, target_modules=["to_q"])))
    rewrite(path, lambda document, tensors: tensors["unet.mid.1.to_q.ether_u"][2].zero_())
    with pytest.raises(EtherFileError, match="mid.1.to_q.ether_u has no direction in block 2 of 3"):
        read_adapter_file(path)


def test_a_missing_vector_is_named_and_so_are_two_that_do_not_match(tmp_path):
    path = tmp_path / WEIGHTS_NAME
    write_adapter_file(path, make_checkpoint(EtherConfig(method="ether_plus", target_modules=["to_q"])))
    rewrite(path, lambda document, tensors: tensors.update({"unet.mid.1.to_q.ether_v_out": torch.ones(1, 5)}))
    with pytest.raises(EtherFileError, match=r"ether_v_out has shape \(1, 5\), but ether_u_out has \(1, 4\)"):
        read_adapter_file(path)
    rewrite(path, lambda document, tensors: tensors.pop("unet.mid.1.to_q.ether_v_out"))
    with pytest.raises(EtherFileError, match="unet: mid.1.to_q lacks ether_v_out"):
        read_adapter_file(path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2**63, "its header would be 9223372036854775808 bytes"),
        (10**6, "its header would be 1000000 bytes, but"),
        (MAX_HEADER_BYTES + 1, f"an adapter's has {MAX_HEADER_BYTES} at most"),
    ],
)
def test_a_header_longer_than_the_file_or_than_any_adapters_is_not_read(file, length, message):
    filler = b" " * (MAX_HEADER_BYTES + 1 if length == MAX_HEADER_BYTES + 1 else 0)
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:] + filler)
    with pytest.raises(EtherFileError, match=f"{WEIGHTS_NAME} .*{message}"):
        read_adapter_file(file)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / WEIGHTS_NAME)
    with pytest.raises(EtherFileError, match="is not a file"):
        read_adapter_file(tmp_path / WEIGHTS_NAME)


def test_what_a_file_says_reaches_the_terminal_escaped_and_cut_short(file):
    rewrite(file, lambda document, tensors: document.update(format_version="\x1b[2J" + "x" * 100_000))
    with pytest.raises(EtherFileError) as caught:
        read_adapter_file(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 10_000, '{"format_version": ' + "9" * 5000 + "}"])
def test_metadata_that_is_no_json_object_is_refused(file, text):
    vectors = {"unet.mid.to_q.ether_u": torch.ones(1, 4)}
    save_file(vectors, file, {"format": "pt", "ether": text, "sha256": digest(vectors, text)})
    with pytest.raises(EtherFileError, match="the metadata is (not JSON|a JSON)"):
        read_adapter_file(file)


def write_peft_folder(folder: Path, config: str, tensors: dict) -> None:
    (folder / "adapter_config.json").write_text(config)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ('{"peft_type": "LORA"}', {"a.ether_u": torch.ones(1, 4)}, "adapter of type 'LORA', not 'ETHER'"),
        ("{}", {"a.ether_u": torch.ones(1, 4)}, "adapter of type None"),
        ("{", {"a.ether_u": torch.ones(1, 4)}, "adapter_config.json is not JSON"),
        ("[]", {"a.ether_u": torch.ones(1, 4)}, "adapter_config.json is a JSON list"),
        ('{"peft_type": "ETHER", "num_blocks": "two"}', {"a.ether_u": torch.ones(1, 4)}, "num_blocks: got 'two'"),
        ('{"peft_type": "ETHER"}', {}, "adapter_model.safetensors holds no vectors"),
        ('{"peft_type": "ETHER"}', {"a.ether_u": torch.zeros(1, 4)}, "a.ether_u has no direction in block 0"),
        ('{"peft_type": "ETHER"}', {"a.lora_A": torch.ones(1, 4)}, "a.lora_A does not belong to ether"),
        (
            '{"peft_type": "ETHER"}',
            {"a.ether_u": torch.ones(1, 4), "base_model.model.a.ether_u": torch.ones(1, 4)},
            "holds a vector twice",
        ),
        (f'{{"peft_type": "ETHER", "x": "{"x" * MAX_DOCUMENT_BYTES}"}}', {"a.ether_u": torch.ones(1, 4)}, "at most"),
    ],
)
def test_a_bad_folder_of_peft_is_explained(tmp_path, config, tensors, message):
    write_peft_folder(tmp_path, config, tensors)
    with pytest.raises(EtherFileError, match=message):
        find_adapter_file(tmp_path)


@pytest.mark.parametrize("field", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}])
def test_a_config_that_trains_the_model_itself_is_not_written(tmp_path, field):
    with pytest.raises(ValueError, match=next(iter(field))):
        write_adapter_file(tmp_path / WEIGHTS_NAME, make_checkpoint(EtherConfig(target_modules=["to_q"], **field)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "message"), [(float("nan"), "NaN"), (0.0, "no direction in block 0 of 1")])
def test_a_broken_vector_is_not_written_over_a_good_file(file, number, message):
    before = file.read_bytes()
    broken = make_checkpoint(EtherConfig(target_modules=["to_q"]))
    next(iter(broken.tensors["unet"].values())).fill_(number)
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} was not saved: unet: mid.0.to_q.ether_u .*{message}"):
        write_adapter_file(file, broken)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize("where", ["../outside", "/etc"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, where):
    with pytest.raises(ValueError, match="leads out of the folder"):
        find_adapter_file(tmp_path, hub=HubSource(subfolder=where))
    with pytest.raises(ValueError, match="leads out of the folder"):
        find_adapter_file(tmp_path, weight_name=where)


def test_a_missing_source_says_what_was_looked_for(tmp_path, file):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_adapter_file("no/such/place/at all")
    with pytest.raises(FileNotFoundError, match=f"has no other.safetensors; it holds {WEIGHTS_NAME}"):
        find_adapter_file(tmp_path, weight_name="other.safetensors")


def make_cached_repository(cache: Path, name: str) -> Path:
    """The folder of a repository's files in a cache laid out as huggingface_hub lays it out."""
    repo = cache / f"models--someone--{name}"
    snapshot = repo / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_folder_of_peft_in_the_hub_cache_loads_offline(tmp_path):
    snapshot = make_cached_repository(tmp_path, "dog")
    write_peft_folder(snapshot, '{"peft_type": "ETHER"}', {"base_model.model.mid.to_q.ether_u": torch.ones(1, 4)})
    found = find_adapter_file("someone/dog", hub=HubSource(cache_dir=tmp_path, local_files_only=True))
    assert list(found.tensors[None]) == ["mid.to_q.ether_u"]


def test_an_adapter_in_the_hub_cache_loads_offline_and_a_missing_one_says_what_is_missing(tmp_path, file):
    snapshot = make_cached_repository(tmp_path / "cache", "dog")
    (snapshot / WEIGHTS_NAME).write_bytes(file.read_bytes())
    found = find_adapter_file("someone/dog", hub=HubSource(cache_dir=tmp_path / "cache", local_files_only=True))
    assert set(found.tensors["unet"]) == set(read_adapter_file(file).tensors["unet"])
    with pytest.raises(OSError, match=f"someone/cat: {WEIGHTS_NAME} is not in the local cache"):
        find_adapter_file("someone/cat", hub=HubSource(cache_dir=tmp_path / "cache", local_files_only=True))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"unet.a.ether_u_out": torch.ones(1, 4)}, "sides='both' needs method='ether_plus'"),
        ({"unet.a.ether_u": torch.ones(1, 4), "unet.b.ether_u": torch.ones(2, 2)}, "b.ether_u has shape .2, 2., but"),
        ({"unet.a.ether_v": torch.ones(1, 4)}, "unet: a lacks ether_u"),
        ({"unet.a.ether_u": torch.tensor(1.0)}, "num_blocks=1 needs"),
    ],
)
def test_a_state_dict_that_makes_no_sense_is_refused(vectors, message):
    with pytest.raises(EtherFileError, match=f"state dict: .*{message}"):
        from_state_dict(vectors)


def test_method_sides_and_blocks_are_read_off_a_state_dict():
    checkpoint = make_checkpoint(EtherConfig(method="ether_plus", num_blocks=3, target_modules=["to_q"]))
    flat = {f"unet.{key}": tensor for key, tensor in checkpoint.tensors["unet"].items()}
    config = from_state_dict(flat).configs["unet"]
    assert (config.method, config.sides, config.num_blocks) == ("ether_plus", "both", 3)


@pytest.mark.parametrize(
    ("component", "path", "canonical"),
    [
        ("text_encoder", "encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder", "text_model.encoder.layers.0.q_proj", "text_model.encoder.layers.0.q_proj"),
        ("text_encoder_2", "encoder.block.0.layer.0.q", "encoder.block.0.layer.0.q"),
        ("unet", "mid_block.attn.to_q.base_layer", "mid_block.attn.to_q"),
    ],
)
def test_paths_in_files_do_not_depend_on_the_release_of_transformers(component, path, canonical):
    assert canonical_path(component, path) == canonical
