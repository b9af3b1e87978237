"""Adapters that cannot be loaded, saved or fused: what is said, and that the pipeline is as it was before."""

import copy

import numpy as np
import pytest
import torch
from helpers.pipelines import TwinPipeline, adapt, assert_unchanged, generate, open_pipeline, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import EtherFileError


@pytest.mark.parametrize("name", ["", "dog.v2", "keys", "training"])
def test_a_name_that_cannot_be_one_is_refused_before_anything_changes(tiny_pipeline, name):
    vectors = adapt(tiny_pipeline).ether_state_dict()
    tiny_pipeline.unload_ether_weights()
    before = snapshot(tiny_pipeline)
    with pytest.raises(ValueError, match=f"adapter_name={name!r}"):
        tiny_pipeline.load_ether_weights(vectors, name)
    assert_unchanged(tiny_pipeline, before)


def test_a_folder_of_peft_that_fits_two_components_is_refused(tiny_pipeline, tmp_path):
    twins = TwinPipeline(tiny_pipeline.unet, copy.deepcopy(tiny_pipeline.unet))
    get_peft_model(copy.deepcopy(tiny_pipeline.unet), EtherConfig(init_weights=False)).save_pretrained(tmp_path)
    with pytest.raises(EtherFileError, match=r"fits several components \(unet, unet_2\)"):
        twins.load_ether_weights(tmp_path)


def shorten(vectors):
    key = next(key for key in vectors if key.endswith("attn1.to_q.ether_u"))
    return {**vectors, key: vectors[key][:, :-1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, r"to_q.ether_u has shape \(2, 7\), but the layer here has 16 inputs and needs \(2, 8\)"),
        (lambda v: {k.replace("to_q", "to_query"): t for k, t in v.items()}, "to_query does not exist in this UNet2D"),
        (lambda v: {k.replace("unet.", "transformer."): t for k, t in v.items()}, "adapts transformer, which this"),
        (lambda v: {k: t * float("inf") for k, t in v.items()}, "finite floating-point numbers"),
        (lambda v: {k: t * 0 for k, t in v.items()}, "_proj.ether_u has no direction in block 0 of 2"),
        (lambda v: {k: t.int() for k, t in v.items()}, "finite floating-point numbers"),
        (lambda v: {k.replace("attn1.to_q", "norm1"): t for k, t in v.items()}, "is a LayerNorm here"),
        (lambda v: v | {k.replace("text_model.", ""): t for k, t in v.items()}, "is there twice, under two names"),
        (lambda v: {k.replace("to_q.", "to_q.base_layer."): t for k, t in v.items()}, "base_layer does not exist"),
        (lambda v: {3: next(iter(v.values()))}, "3 is not of the form"),
        (lambda v: {k: 3 for k in v}, "is a int, not a tensor"),
        (lambda v: {}, "holds no vectors"),
        (lambda v: {k.rpartition(".")[0]: t for k, t in v.items()}, "not of the form"),
    ],
)
def test_an_adapter_that_does_not_fit_is_explained_and_changes_nothing(tiny_pipeline, change, message):
    vectors = adapt(tiny_pipeline, num_blocks=2).ether_state_dict()
    tiny_pipeline.unload_ether_weights()
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match=message):
        tiny_pipeline.load_ether_weights(change(vectors))
    assert_unchanged(tiny_pipeline, before)


def test_an_adapter_of_another_architecture_names_module_and_shape(tiny_pipeline, wider_pipeline_folder, tmp_path):
    adapt(open_pipeline(wider_pipeline_folder)).save_ether_weights(tmp_path)
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match=rf"{WEIGHTS_NAME}: unet: .*ether_u has shape \(1, 24\), but .* has 16"):
        tiny_pipeline.load_ether_weights(tmp_path)
    assert_unchanged(tiny_pipeline, before)


@pytest.mark.parametrize("content", [b"", b"\x80\x04abc", b"PK\x03\x04", b"\xff" * 100])
def test_a_bad_file_changes_nothing(tiny_pipeline, tmp_path, content):
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match=WEIGHTS_NAME):
        tiny_pipeline.load_ether_weights(tmp_path)
    assert_unchanged(tiny_pipeline, before)


def test_a_failed_second_load_leaves_the_first_adapter_generating(trained):
    image = generate(trained)
    vectors = {key.replace("to_q", "to_query"): vector for key, vector in trained.ether_state_dict().items()}
    with pytest.raises(EtherFileError, match="to_query does not exist"):
        trained.load_ether_weights(vectors, "second")
    assert np.array_equal(generate(trained), image)
    assert trained.get_list_adapters() == {"unet": ["default"], "text_encoder": ["default"]}


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_an_injection_that_fails_midway_is_undone(trained, component):
    vectors = trained.ether_state_dict()
    trained.load_ether_weights(vectors, "second")
    trained.set_adapters(["second", "default"], [0.5, 1.0])
    image, before = generate(trained), snapshot(trained)
    wanted = [p.requires_grad for p in trained.unet.parameters()]
    model = getattr(trained, component)
    model.extra = nn.Linear(4, 4, device="meta")  # fits by shape, but there is no weight to reflect
    extra = {key.rpartition(".")[2]: t.new_ones(2, 2) for key, t in vectors.items() if key.startswith(component)}
    with pytest.raises(ValueError, match="extra has no weights"):
        trained.load_ether_weights(vectors | {f"{component}.extra.{k}": t for k, t in extra.items()}, "third")
    assert type(model.extra) is nn.Linear
    del model.extra
    assert_unchanged(trained, before)
    assert trained.get_active_adapters() == ["second", "default"]
    assert trained.get_list_adapters() == {"unet": ["default", "second"], "text_encoder": ["default", "second"]}
    assert [p.requires_grad for p in trained.unet.parameters()] == wanted
    assert np.array_equal(generate(trained), image)


@pytest.mark.parametrize(
    ("layer", "path", "message"),
    [
        (nn.Conv2d(4, 4, 1, groups=2), "extra", "extra is a grouped convolution here"),
        (nn.MultiheadAttention(4, 1), "extra.out_proj", "extra.out_proj belongs to a torch.nn.MultiheadAttention"),
        (nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2]), "extra", "extra is a AdaptiveLogSoftmaxWithLoss here"),
    ],
)
def test_a_layer_that_cannot_be_reflected_is_named_before_anything_changes(tiny_pipeline, layer, path, message):
    vectors = adapt(tiny_pipeline, num_blocks=2).ether_state_dict()
    tiny_pipeline.unload_ether_weights()
    tiny_pipeline.unet.extra = layer
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match=message):
        tiny_pipeline.load_ether_weights(vectors | {f"unet.{path}.ether_u": torch.ones(2, 2)})
    assert_unchanged(tiny_pipeline, before)


def test_the_matrices_of_another_adapter_are_no_layers(tiny_pipeline):
    tiny_pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]), adapter_name="lora")
    path = next(name for name, _ in tiny_pipeline.unet.named_modules() if name.endswith("to_q.lora_A.lora"))
    before = snapshot(tiny_pipeline)
    with pytest.raises(EtherFileError, match="lora_A.lora is a part of another adapter here"):
        tiny_pipeline.load_ether_weights({f"unet.{path}.ether_u": torch.ones(1, 16)})
    assert_unchanged(tiny_pipeline, before)


def test_a_component_without_weights_is_refused(trained, tiny_pipeline):
    vectors = trained.ether_state_dict()
    trained.unload_ether_weights()
    trained.unet.to("meta")
    with pytest.raises(ValueError, match="to_q has no weights"):
        trained.load_ether_weights(vectors)
    assert not any(isinstance(m, EtherLayer) for part in (trained.unet, trained.text_encoder) for m in part.modules())


def test_metadata_does_not_speak_over_the_file(trained, tmp_path):
    with pytest.raises(ValueError, match="the file itself says what base_model is"):
        trained.save_ether_weights(tmp_path, metadata={"prompt": "a dog", "base_model": "mine"})
    assert not list(tmp_path.iterdir())


def test_nothing_to_save_fuse_or_name_is_an_error(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="holds no ETHER adapter"):
        tiny_pipeline.save_ether_weights(tmp_path)
    with pytest.raises(ValueError, match="components that carry ETHER are none"):
        tiny_pipeline.fuse_ether()
    adapt(tiny_pipeline)
    with pytest.raises(ValueError, match="vae: components that carry ETHER are unet, text_encoder|text_encoder, unet"):
        tiny_pipeline.fuse_ether(components=["vae"])
    with pytest.raises(ValueError, match="there is no adapter cat"):
        tiny_pipeline.fuse_ether(adapter_names=["cat"])
    tiny_pipeline.load_ether_weights({k: v for k, v in tiny_pipeline.ether_state_dict().items() if "unet" in k}, "dog")
    with pytest.raises(ValueError, match="nothing to fuse"):
        tiny_pipeline.fuse_ether(["text_encoder"], adapter_names=["dog"])
    tiny_pipeline.delete_adapters("dog")
    with pytest.raises(ValueError, match="weight_name='adapter.bin' is a pickle"):
        tiny_pipeline.save_ether_weights(tmp_path, weight_name="adapter.bin")
