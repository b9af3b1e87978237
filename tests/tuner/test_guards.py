"""Methods of models that would drop an adapter, or write what does not open, are refused on adapted models alone."""

import copy

import pytest
import torch
from diffusers import ModelMixin
from helpers.flow_zoo import make
from helpers.pipelines import adapt, generate, open_pipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.guards import projects_at_once
from ether_diffusion.tuner.layer import EtherLayer

MODELS = ["unet", "vae", "flux", "sd3", "chroma"]
ADDED = ["flux", "sd3", "chroma"]


@pytest.fixture
def model(request, tiny_pipeline, tmp_path):
    name = request.param
    found = getattr(tiny_pipeline, name) if hasattr(tiny_pipeline, name) else make(name, tmp_path).transformer
    return found.requires_grad_(False)


def put(model, *targets: str, kind=EtherConfig) -> None:
    options = {"init_weights": False} if kind is EtherConfig else {"init_lora_weights": False}
    model.add_adapter(kind(target_modules=list(targets), **options), adapter_name="dog")


def kinds(model) -> list:
    return [(name, type(module)) for name, module in model.named_modules()]


def projections_are_one(model) -> bool:
    return any(name.endswith(("to_qkv", "to_kv")) for name, _ in model.named_modules())


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "targets"),
    [(name, targets) for name in MODELS for targets in [["to_q"], ["to_k"], ["to_v"], ["to_v", "to_out.0"]]]
    + [(name, ["add_k_proj"]) for name in ADDED],
    indirect=["model"],
)
def test_projections_with_an_adapter_are_not_made_one(model, targets):
    put(model, *targets)
    before, attributes = kinds(model), set(vars(model))
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="fuse_qkv_projections: dog would be lost without a word; merge adapters"):
            each.fuse_qkv_projections()
        assert kinds(each) == before and set(vars(each)) == attributes
    model.delete_adapters("dog")
    for path, layer in list(model.named_modules())[::-1]:
        if isinstance(layer, EtherLayer):
            model.set_submodule(path, layer.base_layer)
    model.fuse_qkv_projections()
    assert projections_are_one(model)


@torch.no_grad()
@pytest.mark.parametrize("targets", [r".*up_blocks.*to_q", r".*down_blocks.*to_v", r".*attn2\.to_k"])
def test_an_adapter_on_some_blocks_alone_keeps_all_of_them_apart(tiny_pipeline, targets):
    unet = tiny_pipeline.unet
    unet.add_adapter(EtherConfig(target_modules=targets), adapter_name="dog")
    before = kinds(unet)
    with pytest.raises(ValueError, match="dog would be lost"):
        unet.fuse_qkv_projections()
    assert kinds(unet) == before and not hasattr(unet, "original_attn_processors")


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "kind", "targets"),
    [
        *[(name, EtherConfig, ["to_out.0"]) for name in MODELS],
        *[(name, LoraConfig, ["to_out.0"]) for name in MODELS],
        ("unet", LoraConfig, ["to_q"]),
        ("unet", EtherConfig, ["proj_in", "conv1"]),
    ],
    indirect=["model"],
)
def test_adapters_beside_the_projections_and_of_other_methods_are_left_to_diffusers(model, kind, targets):
    put(model, *targets, kind=kind)
    model.fuse_qkv_projections()
    assert projections_are_one(model) and any(isinstance(m, BaseTunerLayer) for m in model.modules())
    model.unfuse_qkv_projections()


@pytest.mark.parametrize("parts", [{}, {"unet": True, "vae": False}, {"vae": True}])
@pytest.mark.parametrize("carrying", ["unet", "vae"])
def test_a_pipeline_makes_one_projection_of_the_components_that_may_be(tiny_pipeline, parts, carrying):
    tiny_pipeline.requires_safety_checker = False
    put(getattr(tiny_pipeline, carrying), "to_q")
    other = {"unet": "vae", "vae": "unet"}[carrying]
    with pytest.raises(ValueError, match="dog would be lost"), torch.no_grad():
        tiny_pipeline.fuse_qkv_projections(**{"unet": True, "vae": True} | parts | {carrying: True})
    assert not any(projections_are_one(getattr(tiny_pipeline, name)) for name in ("unet", "vae"))
    with torch.no_grad():
        tiny_pipeline.fuse_qkv_projections(**{carrying: False, other: True})
    assert projections_are_one(getattr(tiny_pipeline, other))
    generate(tiny_pipeline)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("targets", [["to_q"], "all-linear", r".*to_v", None])
def test_no_adapter_is_put_on_projections_that_are_one(model, targets):
    model.fuse_qkv_projections()
    before = kinds(model)
    with pytest.raises(ValueError, match="is fused with others into one projection.*: call unfuse_qkv_projections"):
        model.add_adapter(EtherConfig(target_modules=targets), adapter_name="dog")
    assert kinds(model) == before and not hasattr(model, "peft_config")
    model.unfuse_qkv_projections()
    put(model, "to_q")
    assert any(isinstance(module, EtherLayer) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("model", "target"), [("qwen", "to_q"), ("klein", "to_qkv_mlp_proj")], indirect=["model"])
def test_projections_that_diffusers_leaves_apart_may_have_adapters(model, target):
    put(model, target)
    before = [path for path, module in model.named_modules() if isinstance(module, EtherLayer)]
    model.fuse_qkv_projections()
    assert before == [path for path, module in model.named_modules() if isinstance(module, EtherLayer)]
    assert before and not any(projects_at_once(model.get_submodule(path.rpartition(".")[0])) for path in before)


@torch.no_grad()
@pytest.mark.parametrize("model", ["unet", "flux"], indirect=True)
def test_an_adapter_on_the_one_projection_is_not_lost_when_it_is_split_or_made_again(model):
    model.fuse_qkv_projections()
    put(model, "to_qkv")
    before = kinds(model)
    for call in ("unfuse_qkv_projections", "fuse_qkv_projections"):
        with pytest.raises(ValueError, match=f"{call}: dog would be lost"):
            getattr(model, call)()
    assert kinds(model) == before


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_with_an_adapter_is_not_saved_as_a_file_that_does_not_open(model, merged, tmp_path):
    put(model, "to_q")
    for layer in model.modules() if merged else ():
        if isinstance(layer, EtherLayer):
            layer.merge()
    with pytest.raises(ValueError, match="save_pretrained: dog cannot .* save_ether_weights .*merge_adapters"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("way", ["loaded", "PEFT"])
def test_a_model_is_saved_as_ever_before_and_after_the_adapter(tiny_pipeline, one, tmp_path, way):
    unet = tiny_pipeline.unet
    unet.save_pretrained(tmp_path / "before")
    if way == "loaded":
        tiny_pipeline.load_ether_weights(one)
        with pytest.raises(ValueError, match="save_pretrained: default_0 cannot be written"):
            unet.save_pretrained(tmp_path / "with")
        tiny_pipeline.unload_ether_weights()
    else:
        adapted = get_peft_model(unet, EtherConfig(target_modules=["to_q"]))
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.unload()
    unet.save_pretrained(tmp_path / "after")
    weights = [type(unet).from_pretrained(tmp_path / name).state_dict() for name in ("before", "after")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_lora_is_left_to_diffusers(tiny_pipeline, tmp_path):
    put(tiny_pipeline.unet, "to_q", kind=LoraConfig)
    assert isinstance(tiny_pipeline.unet, ModelMixin)
    tiny_pipeline.unet.save_pretrained(tmp_path / "unet")
    assert (tmp_path / "unet" / "config.json").is_file()


@pytest.mark.parametrize("way", ["loaded", "added"])
def test_what_a_text_encoder_saves_of_its_adapter_opens(tiny_pipeline, tiny_pipeline_folder, tmp_path, way):
    """Models of transformers write the adapter alone, for `load_adapter`."""
    if way == "loaded":
        vectors = adapt(open_pipeline(tiny_pipeline_folder), "ether_plus").ether_state_dict()
        tiny_pipeline.load_ether_weights({k: v for k, v in vectors.items() if k.startswith("text_encoder")}, "dog")
    else:
        put(tiny_pipeline.text_encoder, "q_proj", "fc1")
    tiny_pipeline.text_encoder.save_pretrained(tmp_path)
    image, other = generate(tiny_pipeline), open_pipeline(tiny_pipeline_folder)
    assert (generate(other) != image).any()
    other.text_encoder.load_adapter(str(tmp_path), adapter_name="dog")
    assert (generate(other) == image).all()
