"""One record for each adapter of a pipeline, which every pipeline over the same components finds."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers.control import make_encoder, open_control
from helpers.pipelines import adapt, assert_unchanged, open_pipeline, snapshot

from ether_diffusion.adapters import components, fit


def test_a_record_says_all_of_an_adapter_and_goes_with_it(trained, tiny_pipeline_folder, tmp_path):
    trained.save_ether_weights(tmp_path, metadata={"prompt": "a photo of sks dog"})
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(tmp_path, "dog")
    record = pipe.ether_adapters["dog"]
    assert record.components == ["text_encoder", "unet"] or record.components == ["unet", "text_encoder"]
    assert record.metadata == {"prompt": "a photo of sks dog"} and record.other_base == []
    pipe.delete_adapters("dog")
    assert pipe.ether_adapters == {}
    assert not any(components.RECORDS in model.__dict__ for model in components.models_of(pipe).values())


def test_pipelines_over_the_same_components_share_the_record(trained, tiny_pipeline_folder, tmp_path):
    trained.save_ether_weights(tmp_path / "one", metadata={"prompt": "a dog"})
    pipe = open_pipeline(tiny_pipeline_folder)
    before = snapshot(pipe)
    pipe.load_ether_weights(tmp_path / "one", "dog")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert other.ether_adapters["dog"] is pipe.ether_adapters["dog"]
    other.save_ether_weights(tmp_path / "again")
    again = open_pipeline(tiny_pipeline_folder)
    again.load_ether_weights(tmp_path / "again", "dog")
    assert again.ether_adapters["dog"].metadata == {"prompt": "a dog"}
    other.unload_ether_weights()
    assert_unchanged(pipe, before)
    assert not pipe.ether_adapters


def test_an_adapter_that_peft_put_on_has_a_record_and_one_that_peft_took_off_has_none(tiny_pipeline):
    adapt(tiny_pipeline, name="own")
    assert list(tiny_pipeline.ether_adapters) == ["own"]
    tiny_pipeline.unet.delete_adapters("own")
    assert tiny_pipeline.ether_adapters["own"].components == ["text_encoder"]


def test_an_encoder_is_found_by_every_control_pipeline_over_the_unet(tiny_pipeline_folder):
    pipe = open_control(tiny_pipeline_folder)
    pipe.add_control("edges", make_encoder(pipe))
    other = type(pipe).from_pipe(pipe)
    assert list(other.controls) == ["edges"]
    other.delete_adapters("edges")
    assert not pipe.controls and not pipe.ether_adapters


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_load_in_which_anything_raises_changes_nothing(trained, tiny_pipeline_folder, monkeypatch, where):
    """The comparison with the base's fingerprint, and what comes after the layers are wrapped."""
    vectors = {name: tensor.clone() for name, tensor in trained.ether_state_dict().items()}
    pipe = open_pipeline(tiny_pipeline_folder)
    before, trainable = snapshot(pipe), [p.requires_grad for p in pipe.text_encoder.parameters()]

    def fail(*_, **__):
        raise RuntimeError("no")

    if where == "before":
        monkeypatch.setattr(fit, "differing_components", fail)
    else:
        monkeypatch.setattr("ether_diffusion.adapters.attach._maybe_remove_and_reapply_group_offloading", fail)
    with pytest.raises(RuntimeError, match="no"):
        pipe.load_ether_weights(vectors)
    assert_unchanged(pipe, before)
    assert [p.requires_grad for p in pipe.text_encoder.parameters()] == trainable
    monkeypatch.undo()
    pipe.load_ether_weights(vectors)


def test_loading_draws_no_random_numbers_and_patches_nothing(trained, tiny_pipeline_folder):
    vectors = {name: tensor.clone() for name, tensor in trained.ether_state_dict().items()}
    pipe = open_pipeline(tiny_pipeline_folder)
    state, register = torch.get_rng_state(), torch.nn.Module.register_parameter
    pipe.load_ether_weights(vectors)
    assert torch.equal(torch.get_rng_state(), state) and torch.nn.Module.register_parameter is register


def test_exactly_the_layers_of_the_file_are_adapted(tiny_pipeline, tiny_pipeline_folder):
    """A path that ends like another (conv_in, and time_embedding.conv_in) is not taken for it."""
    tiny_pipeline.unet.add_module("extra", torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 4, 1)}))
    vectors = {"unet.conv_in.ether_u": torch.ones(1, 4)}
    tiny_pipeline.load_ether_weights(vectors)
    assert list(tiny_pipeline.ether_state_dict()) == list(vectors)
