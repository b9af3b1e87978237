"""One record for each adapter of a pipeline, which every pipeline over the same components finds."""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers import zoo
from helpers.control import call_unet, make_encoder, open_control
from helpers.pipelines import (
    ONE_GREY_LEVEL,
    TwinPipeline,
    adapt,
    assert_unchanged,
    generate,
    open_pipeline,
    snapshot,
)
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.adapters import components, fit
from ether_diffusion.export import merge_adapters


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


# Models that PEFT has wrapped ------------------------------------------------------------------------------------

WRAPPED = {
    "ether": EtherConfig(method="ether_plus", init_weights=False, target_modules=["to_q", "q_proj"]),
    "lora": LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "q_proj"]),
}


@pytest.fixture(params=[["unet"], ["text_encoder"], ["unet", "text_encoder"]], ids="+".join)
def wrapped(request, tiny_pipeline):
    """wrapped(method): the pipeline with PEFT's own models as components."""

    def wrap(method: str, **options):
        torch.manual_seed(1)
        for component in request.param:
            config = copy.deepcopy(WRAPPED[method])
            setattr(tiny_pipeline, component, get_peft_model(getattr(tiny_pipeline, component), config, **options))
        return tiny_pipeline, request.param

    return wrap


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", WRAPPED)
def test_an_adapter_comes_and_goes_on_a_component_that_is_a_peft_model(
    wrapped, one, tiny_pipeline_folder, tmp_path, method, mixed
):
    if mixed and method == "ether":
        pytest.skip("PEFT mixes its own methods alone")
    pipe, components = wrapped(method, mixed=mixed)
    before = generate(pipe)
    pipe.load_ether_weights(one, "dog")
    image = generate(pipe)
    assert not np.array_equal(image, before)
    saved = pipe.save_ether_weights(tmp_path / "dog", "dog")
    fresh = open_pipeline(tiny_pipeline_folder)
    fresh.load_ether_weights(one)
    expected = generate(fresh)
    fresh.unload_ether_weights()
    fresh.load_ether_weights(saved)
    assert np.array_equal(generate(fresh), expected)
    pipe.load_ether_weights(one, "dog", hotswap=True)
    assert np.array_equal(generate(pipe), image)
    pipe.set_adapters("dog", 0.5)
    assert not np.array_equal(generate(pipe), image)
    pipe.set_adapters("default")
    pipe.delete_adapters("dog")
    assert np.array_equal(generate(pipe), before)
    assert all(type(getattr(pipe, name)) is (PeftMixedModel if mixed else PeftModel) for name in components)


def test_the_own_adapter_of_a_peft_model_is_saved_and_fused_as_any_other(wrapped, tiny_pipeline_folder, tmp_path):
    pipe, components = wrapped("ether")
    image = generate(pipe)
    fresh = open_pipeline(tiny_pipeline_folder)
    fresh.load_ether_weights(pipe.save_ether_weights(tmp_path))
    assert set(fresh.ether_adapters["default_0"].components) == set(components)
    assert np.abs(generate(fresh) - image).max() <= ONE_GREY_LEVEL
    pipe.fuse_ether()
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    pipe.unfuse_ether()
    assert np.array_equal(generate(pipe), image)


@pytest.mark.parametrize(
    "remove",
    [
        lambda pipe, folder: pipe.unload_ether_weights(),
        lambda pipe, folder: pipe.delete_adapters("default"),
        lambda pipe, folder: merge_adapters(pipe, folder / "merged"),
    ],
    ids=["unload", "delete", "merge"],
)
def test_what_a_peft_model_cannot_run_without_is_not_removed(wrapped, tiny_pipeline_folder, tmp_path, remove):
    base = generate(open_pipeline(tiny_pipeline_folder))
    pipe, components = wrapped("ether")
    image, state = generate(pipe), {name: dict(getattr(pipe, name).named_modules()) for name in components}
    with pytest.raises(ValueError, match=r"is a PeftModel, which does not run without default: put .*get_base_model"):
        remove(pipe, tmp_path)
    assert np.array_equal(generate(pipe), image) and not any(tmp_path.iterdir())
    assert state == {name: dict(getattr(pipe, name).named_modules()) for name in components}
    for name in components:
        setattr(pipe, name, getattr(pipe, name).get_base_model())
    assert np.array_equal(generate(pipe), image)
    remove(pipe, tmp_path)
    if not (tmp_path / "merged").exists():
        assert np.array_equal(generate(pipe), base)


def test_a_lora_of_a_peft_model_is_not_unloaded_beside_ether(wrapped, one):
    pipe, _ = wrapped("lora")
    pipe.load_ether_weights(one, "dog")
    pipe.set_adapters(["default", "dog"])
    image = generate(pipe)
    for remove in (pipe.unload_lora_weights, lambda: pipe.delete_adapters(["dog", "default"])):
        with pytest.raises(ValueError, match="is a PeftModel, which does not run without default"):
            remove()
        assert np.array_equal(generate(pipe), image)


# One model under two names ---------------------------------------------------------------------------------------


def twins(folder, shared: bool):
    unet = open_pipeline(folder).unet
    return TwinPipeline(unet, unet if shared else open_pipeline(folder).unet)


def outputs(pipe) -> list[torch.Tensor]:
    with torch.no_grad():
        return [call_unet(model) for model in (pipe.unet, pipe.unet_2)]


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("names", [["unet"], ["unet_2"], ["unet", "unet_2"]], ids="+".join)
@pytest.mark.parametrize("shared", [False, True])
def test_a_model_under_two_names_is_saved_under_both(tiny_pipeline_folder, tmp_path, method, names, shared):
    pipe = twins(tiny_pipeline_folder, shared=True)
    vectors = zoo.adapt_components(pipe, "unet", method=method)
    expected = outputs(pipe)
    file = pipe.save_ether_weights(tmp_path)
    assert {key.partition(".")[0] for key in vectors} == {"unet", "unet_2"}
    assert all(torch.equal(pipe.ether_state_dict()[key], vector) for key, vector in vectors.items())
    for source in (file, vectors):
        other = twins(tiny_pipeline_folder, shared)
        base = outputs(other)
        other.load_ether_weights(source, "dog", components=names)
        other.load_ether_weights(source, "dog", components=names, hotswap=True)
        for k, name in enumerate(("unet", "unet_2")):
            assert torch.equal(outputs(other)[k], (expected if shared or name in names else base)[k])
        other.fuse_ether(components=names)
        other.unfuse_ether(components=names)
        other.set_adapters("dog", {name: 0.0 for name in names})
        assert all(map(torch.equal, outputs(other), base))
        other.unload_ether_weights()
        assert all(map(torch.equal, outputs(other), base))
        assert not any(isinstance(module, EtherLayer) for module in other.unet.modules())


def test_modules_of_a_model_under_two_names_are_saved_with_it(tiny_pipeline_folder, tmp_path):
    pipe = twins(tiny_pipeline_folder, shared=True)
    torch.nn.init.normal_(pipe.unet.conv_in.weight)
    expected = outputs(pipe)
    file = pipe.save_ether_weights(tmp_path, "dog", replaced_modules={"unet_2": ["conv_in"]})
    for shared in (False, True):
        other = twins(tiny_pipeline_folder, shared)
        base = outputs(other)
        other.load_ether_weights(file, "dog")
        assert all(map(torch.equal, outputs(other), expected))
        other.unload_ether_weights()
        assert all(map(torch.equal, outputs(other), base))


def test_different_vectors_for_two_names_of_one_model_are_refused(tiny_pipeline_folder):
    vectors = zoo.adapt_components(twins(tiny_pipeline_folder, shared=True), "unet")
    vectors = {key: tensor.flip(-1) if key.startswith("unet_2") else tensor for key, tensor in vectors.items()}
    pipe = twins(tiny_pipeline_folder, shared=True)
    with pytest.raises(ValueError, match="unet and unet_2 are one model here, but the file holds different"):
        pipe.load_ether_weights(vectors)
    assert not pipe.ether_adapters
    twins(tiny_pipeline_folder, shared=False).load_ether_weights(vectors)
    pipe.load_ether_weights(vectors, components="unet_2")
