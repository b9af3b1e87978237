"""An adapter with a control encoder: its file, loaded, exchanged and refused."""

import pytest
import torch
from helpers.control import IMAGE, content, make_encoder, open_control, same
from helpers.pipelines import adapt, assert_unchanged, generate, snapshot

from ether_diffusion import (
    EtherFileError,
)
from ether_diffusion.adapters.reading import read_adapter_file


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "encoder alone"])
def test_vectors_and_encoder_are_one_file_that_generates_the_same_image(
    plain, tiny_pipeline_folder, tmp_path, vectors
):
    if vectors:
        adapt(plain, num_blocks=2)
    plain.add_control("default", make_encoder(plain, interpolation="lanczos"))
    wanted = generate(plain, control_image=IMAGE)
    path = plain.save_ether_weights(tmp_path, "default", metadata={"prompt": "a dog"})
    loaded = open_control(tiny_pipeline_folder)
    torch.manual_seed(7)
    loaded.load_ether_weights(tmp_path, "again")
    assert torch.initial_seed() == 7 and torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert same(generate(loaded, control_image=IMAGE), wanted)
    assert loaded.controls["again"].encoder.config.interpolation == "lanczos"
    assert not any(p.requires_grad for p in loaded.controls["again"].encoder.parameters())
    assert content(loaded.save_ether_weights(tmp_path / "b")) == content(path)
    checkpoint = read_adapter_file(path)
    assert set(checkpoint.weights) == {"control_encoder"} and bool(checkpoint.configs) == vectors
    assert (checkpoint.metadata["format_version"], checkpoint.metadata["prompt"]) == (2, "a dog")
    with pytest.raises(ValueError, match="already on"):
        loaded.load_ether_weights(tmp_path, "again")
    assert list(loaded.controls) == ["again"]


def test_the_adapter_that_is_loaded_last_is_the_one_that_controls(pipe, tmp_path):
    pipe.save_ether_weights(tmp_path)
    pipe.load_ether_weights(tmp_path, "second")
    assert pipe.get_active_adapters() == ["second"]
    assert [control.active for control in pipe.controls.values()] == [False, True]


def test_vectors_alone_are_still_written_as_version_1(tiny_pipeline, tmp_path):
    path = adapt(tiny_pipeline).save_ether_weights(tmp_path)
    metadata = read_adapter_file(path).metadata
    assert metadata["format_version"] == 1 and "weights" not in metadata


def test_a_stock_pipeline_says_which_one_applies_an_encoder(pipe, tiny_pipeline, tmp_path):
    pipe.save_ether_weights(tmp_path)
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match="a StableDiffusionPipeline does not apply.*EtherControlPipeline"):
        tiny_pipeline.load_ether_weights(tmp_path)
    assert_unchanged(tiny_pipeline, before)


def test_an_encoder_of_another_architecture_changes_nothing(pipe, wider_pipeline_folder, tmp_path):
    pipe.delete_adapters("default")
    pipe.add_control("default", make_encoder(pipe))
    pipe.save_ether_weights(tmp_path)
    wider = open_control(wider_pipeline_folder)
    with pytest.raises(EtherFileError, match="makes 16 channels, but .* 24; it was made for another architecture"):
        wider.load_ether_weights(tmp_path)
    assert not wider.controls


def test_a_load_that_fails_midway_leaves_the_encoders_as_they_were(pipe, tmp_path, monkeypatch):
    pipe.save_ether_weights(tmp_path)
    before, picture = snapshot(pipe), generate(pipe, control_image=IMAGE)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr("ether_diffusion.adapters.attach.Control", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        pipe.load_ether_weights(tmp_path, "second")
    assert_unchanged(pipe, before)
    assert same(generate(pipe, control_image=IMAGE), picture)


def test_an_encoder_is_swapped_in_place(pipe, tiny_pipeline_folder, tmp_path):
    other = adapt(open_control(tiny_pipeline_folder), num_blocks=2, seed=5)
    other.add_control("default", make_encoder(other, seed=6))
    other.save_ether_weights(tmp_path)
    parameters = list(pipe.controls["default"].encoder.parameters())
    pipe.load_ether_weights(tmp_path, hotswap=True)
    assert all(a is b for a, b in zip(parameters, pipe.controls["default"].encoder.parameters(), strict=True))
    assert same(generate(pipe, control_image=IMAGE), generate(other, control_image=IMAGE))
    other.controls["default"].encoder = make_encoder(other, interpolation="lanczos")
    other.save_ether_weights(tmp_path)
    with pytest.raises(ValueError, match="hotswap: .*lanczos.*load it under another name"):
        pipe.load_ether_weights(tmp_path, hotswap=True)
