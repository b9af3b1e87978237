"""The file: what is written comes back, and what is damaged, foreign or malicious is refused by name."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ether_diffusion import EtherConfig
from ether_diffusion.checkpoint import (
    FORMAT_VERSION,
    WEIGHTS_NAME,
    Checkpoint,
    canonical_path,
    digest,
    expected_vectors,
    from_state_dict,
    read_checkpoint,
    write_checkpoint,
)
from ether_diffusion.sources import find_checkpoint


def make_checkpoint(config: EtherConfig, component: str = "unet", layers: int = 2, seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    n = config.num_blocks
    tensors = {
        f"mid.{k}.to_q.{name}": torch.randn(n, 4, generator=generator)
        for k in range(layers)
        for name in expected_vectors(config)
    }
    return Checkpoint({component: config}, {component: tensors}, {"prompt": "a photo of sks dog"})


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / WEIGHTS_NAME
    write_checkpoint(path, make_checkpoint(EtherConfig(target_modules=["to_q"])))
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
    write_checkpoint(tmp_path / WEIGHTS_NAME, written)
    read = read_checkpoint(tmp_path / WEIGHTS_NAME)
    assert read.tensors.keys() == written.tensors.keys()
    for key, tensor in written.tensors[component].items():
        assert torch.equal(read.tensors[component][key], tensor)
    assert (read.configs[component].method, read.configs[component].num_blocks) == (method, blocks)
    assert read.configs[component].sides == config.sides
    assert read.metadata["prompt"] == "a photo of sks dog"
    assert read.metadata["format_version"] == FORMAT_VERSION


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_never_loads(tmp_path, data):
    path = tmp_path / WEIGHTS_NAME
    write_checkpoint(path, make_checkpoint(EtherConfig(target_modules=["to_q"]), layers=1))
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="ether"):
        read_checkpoint(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / WEIGHTS_NAME
    write_checkpoint(path, make_checkpoint(EtherConfig(target_modules=["to_q"]), layers=1))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} is not a whole safetensors file"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "adapter.ckpt", "adapter.pkl", "ADAPTER.PTH"])
def test_a_pickle_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=f"{name} is a pickle by its name"):
        find_checkpoint(tmp_path / name)


def test_a_pickle_that_calls_itself_safetensors_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="holds a pickle, whatever its name says"):
        read_checkpoint(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds a pickle, whatever its name says"):
        read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_with_a_pickle_alone_says_so(tmp_path):
    (tmp_path / "pytorch_ether_weights.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pytorch_ether_weights.bin: pickles are not read"):
        find_checkpoint(tmp_path)


def test_another_safetensors_file_is_not_taken_for_an_adapter(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no ETHER adapter"):
        find_checkpoint(tmp_path / "model.safetensors")


def test_a_newer_format_asks_for_an_upgrade(file):
    rewrite(file, lambda document, tensors: document.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match="newer release .* upgrade ether-diffusion"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.pop("format_version"), "no format_version"),
        (lambda d, t: d.update(configs={}), "but configs for"),
        (lambda d, t: d.update(format_version=0), "no format_version that is"),
        (lambda d, t: d.update(format_version=True), "no format_version that is"),
        (lambda d, t: d.update(configs=[]), "but configs for"),
        (lambda d, t: d.update(configs=3), "but configs for no components"),
        (lambda d, t: d["configs"]["unet"].update(target_modules=5), "target_modules=5 is neither str"),
        (lambda d, t: d["configs"]["unet"].update(exclude_modules=[["a"]]), "exclude_modules="),
        (lambda d, t: d["configs"]["unet"].update(layers_to_transform="all"), "layers_to_transform='all'"),
        (lambda d, t: d["configs"].update(unet=3), "not an object"),
        (lambda d, t: d["configs"]["unet"].update(method="lora"), "method='lora'"),
        (lambda d, t: d["configs"]["unet"].update(num_blocks=0), "num_blocks=0"),
        (lambda d, t: d["configs"]["unet"].update(bias="all"), "bias='all'"),
        (lambda d, t: t.update({"unet.weight": torch.zeros(2)}), "not of the form"),
        (lambda d, t: t.clear(), "holds no vectors"),
    ],
)
def test_a_document_that_makes_no_sense_is_refused(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000])
def test_metadata_that_is_no_json_object_is_refused(file, text):
    vectors = {"unet.mid.to_q.ether_u": torch.ones(1, 4)}
    save_file(vectors, file, {"format": "pt", "ether": text, "sha256": digest(vectors, text)})
    with pytest.raises(ValueError, match="the metadata is (not JSON|a JSON)"):
        read_checkpoint(file)


def test_a_signed_scalar_is_read_without_harm(file):
    rewrite(file, lambda document, tensors: tensors.update({"unet.mid.0.to_q.ether_u": torch.tensor(1.0)}))
    assert read_checkpoint(file).tensors["unet"]["mid.0.to_q.ether_u"].shape == ()


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
        ('{"peft_type": "ETHER", "num_blocks": "two"}', {"a.ether_u": torch.ones(1, 4)}, "num_blocks='two'"),
        ('{"peft_type": "ETHER"}', {}, "adapter_model.safetensors holds no vectors"),
    ],
)
def test_a_bad_folder_of_peft_is_explained(tmp_path, config, tensors, message):
    write_peft_folder(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("field", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}])
def test_a_config_that_trains_the_model_itself_is_not_written(tmp_path, field):
    with pytest.raises(ValueError, match=next(iter(field))):
        write_checkpoint(tmp_path / WEIGHTS_NAME, make_checkpoint(EtherConfig(target_modules=["to_q"], **field)))
    assert not list(tmp_path.iterdir())


def test_a_broken_vector_is_not_written_over_a_good_file(file):
    before = file.read_bytes()
    broken = make_checkpoint(EtherConfig(target_modules=["to_q"]))
    next(iter(broken.tensors["unet"].values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        write_checkpoint(file, broken)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize("where", ["../outside", "/etc"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, where):
    with pytest.raises(ValueError, match="leads out of the folder"):
        find_checkpoint(tmp_path, subfolder=where)
    with pytest.raises(ValueError, match="leads out of the folder"):
        find_checkpoint(tmp_path, weight_name=where)


def test_a_missing_source_says_what_was_looked_for(tmp_path, file):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_checkpoint("no/such/place/at all")
    with pytest.raises(FileNotFoundError, match=f"has no other.safetensors; it holds {WEIGHTS_NAME}"):
        find_checkpoint(tmp_path, weight_name="other.safetensors")


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
    found = find_checkpoint("someone/dog", cache_dir=tmp_path, local_files_only=True)
    assert list(found.tensors[None]) == ["mid.to_q.ether_u"]


def test_an_adapter_in_the_hub_cache_loads_offline_and_a_missing_one_says_what_is_missing(tmp_path, file):
    snapshot = make_cached_repository(tmp_path / "cache", "dog")
    (snapshot / WEIGHTS_NAME).write_bytes(file.read_bytes())
    found = find_checkpoint("someone/dog", cache_dir=tmp_path / "cache", local_files_only=True)
    assert set(found.tensors["unet"]) == set(read_checkpoint(file).tensors["unet"])
    with pytest.raises(OSError, match=f"someone/cat: {WEIGHTS_NAME} is not in the local cache"):
        find_checkpoint("someone/cat", cache_dir=tmp_path / "cache", local_files_only=True)


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
