"""EtherAttnProcessor: the stock processor's answer, whatever is done to the adapters."""

import copy
import importlib.util
import pickle

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from helpers.control import call_unet
from helpers.pipelines import adapt, generate, open_pipeline, snapshot

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.attention import EtherAttnProcessor, disable_ether_attention, enable_ether_attention
from ether_diffusion.tuner.base_layer import intercepted

BLOCKS = {
    "self": dict(query_dim=24, heads=3, dim_head=8),
    "cross": dict(query_dim=24, cross_attention_dim=16, heads=2, dim_head=12),
    "wide heads and biases": dict(query_dim=24, heads=1, dim_head=40, bias=True),
    "group norm and residual": dict(query_dim=24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True),
    "norms and rescaling": dict(query_dim=24, heads=3, dim_head=8, qk_norm="layer_norm", rescale_output_factor=1.5),
    "no scaling": dict(query_dim=24, heads=3, dim_head=8, scale_qk=False),
    "norm cross": dict(query_dim=24, cross_attention_dim=16, heads=3, dim_head=8, cross_attention_norm="layer_norm"),
}


class Holder(torch.nn.Module):
    """A model with one attention block, as diffusers' models have many."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(**options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def block(kind="self", method="ether_plus", targets=("to_q", "to_k", "to_v", "to_out.0"), n=1):
    from peft import inject_adapter_in_model

    model = Holder(**BLOCKS[kind]).eval().requires_grad_(False)
    config = EtherConfig(method=method, target_modules=list(targets), init_weights=False, num_blocks=n)
    return inject_adapter_in_model(config, model)


def inputs(kind: str, mask: bool = False) -> dict:
    torch.manual_seed(1)
    given = {"hidden_states": torch.randn(2, 5, 24)}
    if "cross" in kind:
        given["encoder_hidden_states"] = torch.randn(2, 7, 16)
    if mask:
        given["attention_mask"] = torch.zeros(2, 1, 7 if "cross" in kind else 5)
        given["attention_mask"][0, 0, 2:] = -10000.0
    return given


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_answer_is_that_of_the_stock_processor(kind, method, mask, grad):
    model, given = block(kind, method), inputs(kind, mask)
    with torch.set_grad_enabled(grad):
        stock = model(**given)
        enable_ether_attention(model)
        torch.testing.assert_close(model(**given), stock)


def test_images_as_input_and_spatial_norm_work():
    model = Holder(query_dim=32, heads=4, dim_head=8, spatial_norm_dim=6, residual_connection=True).eval()
    x, temb = torch.randn(2, 32, 4, 5), torch.randn(2, 6, 4, 5)
    stock = model(x, temb=temb)
    enable_ether_attention(model)
    torch.testing.assert_close(model(x, temb=temb), stock)


@pytest.mark.parametrize("targets", [["to_q"], ["to_v", "to_out.0"]])
@torch.no_grad()
def test_blocks_that_are_adapted_in_part_work(targets):
    model, given = block("self", targets=targets), inputs("self")
    stock = model(**given)
    enable_ether_attention(model)
    torch.testing.assert_close(model(**given), stock)


def layers(model):
    return [m for m in model.modules() if hasattr(m, "ether_u")]


CHANGES = {
    "write to the data": lambda model: [m.ether_u["default"].data.copy_(torch.randn(1, 24)) for m in layers(model)],
    "write in place": lambda model: [m.ether_u["default"].add_(torch.randn(1, 24)) for m in layers(model)],
    "write to one entry": lambda model: layers(model)[1].ether_v["default"].data[0, 3].add_(0.5),
    "strength": lambda model: [m.set_scale("default", 0.4) for m in layers(model)],
    "strength 0": lambda model: [m.set_scale("default", 0.0) for m in layers(model)],
    "a call's factor": lambda model: [m.scale_layer(0.5) for m in layers(model)],
    "disabling": lambda model: [m.enable_adapters(False) for m in layers(model)],
    "merging": lambda model: [m.merge() for m in layers(model)],
    "merging and unmerging": lambda model: [(m.merge(), m.unmerge()) for m in layers(model)],
    "writing while merged": lambda model: [
        (m.merge(), m.ether_u["default"].data.neg_().add_(0.3), m.unmerge()) for m in layers(model)
    ],
    "swapping the adapter": lambda model: [
        (m.delete_adapter("default"), m.update_layer("default", EtherConfig(init_weights=False)))
        for m in layers(model)
    ],
    "offloading": cpu_offload,
    "another adapter": lambda model: [
        (m.update_layer("other", EtherConfig(init_weights=False)), m.set_adapter("other")) for m in layers(model)
    ],
    "two adapters": lambda model: [
        (m.update_layer("other", EtherConfig(init_weights=False)), m.set_adapter(["other", "default"]))
        for m in layers(model)
    ],
    "a base weight": lambda model: layers(model)[0].base_layer.weight.data.mul_(1.5),
    "half precision": lambda model: model.bfloat16(),
    "load_state_dict": lambda model: model.load_state_dict(
        {k: v + 0.3 if "ether_" in k else v for k, v in model.state_dict().items()}
    ),
}


CHANGES_NOTHING = ("merging", "merging and unmerging", "offloading", "half precision")


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_answer_follows_every_change(change):
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    before = model(**given)
    torch.manual_seed(5)
    CHANGES[change](model)
    given = {name: tensor.to(layers(model)[0].base_layer.weight.dtype) for name, tensor in given.items()}
    after = model(**given)
    disable_ether_attention(model)
    torch.testing.assert_close(after, model(**given))
    tolerance = {"rtol": 0.05, "atol": 0.05} if after.dtype == torch.bfloat16 else {"atol": 1e-4}
    assert torch.allclose(after.float(), before, **tolerance) is (change in CHANGES_NOTHING)


def test_vectors_are_trained_through_it_and_inference_after_it_sees_the_result():
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    with torch.no_grad():
        before = model(**given)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    model(**given).square().sum().backward()
    assert all(m.ether_u["default"].grad.abs().max() > 0 for m in layers(model))
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(**given)
        assert not torch.allclose(after, before, atol=1e-4)
        disable_ether_attention(model)
        torch.testing.assert_close(after, model(**given))


def test_gradients_flow_through_frozen_adapters_to_what_comes_before():
    model, given = block("self"), inputs("self")
    model.requires_grad_(False)
    x = given["hidden_states"].requires_grad_()
    stock = torch.autograd.grad(model(x).square().sum(), x)[0]
    enable_ether_attention(model)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], stock)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_disabling_it_leaves_nothing_behind(processor):
    model = block("self")
    model.attn.processor = processor()
    enable_ether_attention(model)
    enable_ether_attention(model)
    model(**inputs("self"))
    disable_ether_attention(model)
    assert type(model.attn.processor) is processor
    assert not any(intercepted(module) for module in model.modules())


def swap_one_by_one(unet):
    for module in list(unet.modules())[::2]:
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


SWAPS = {
    "default": lambda unet: unet.set_default_attn_processor(),
    "others": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "some others": swap_one_by_one,
    "one for all": lambda unet: unet.set_attn_processor(EtherAttnProcessor()),
    "slices": lambda unet: unet.set_attention_slice("auto"),
    "slices and back": lambda unet: (unet.set_attention_slice("auto"), unet.set_default_attn_processor()),
    "fused projections and back": lambda unet: (unet.fuse_qkv_projections(), unet.unfuse_qkv_projections()),
}
COPIES = {
    "itself": lambda unet: unet,
    "copy of a copy": lambda unet: copy.deepcopy(copy.deepcopy(unet)),
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
}


@pytest.mark.parametrize("copied_by", COPIES)
@pytest.mark.parametrize("swapped_first", [False, True])
@pytest.mark.parametrize("swap", SWAPS)
@torch.no_grad()
def test_nothing_stays_whatever_happens_to_processors_and_models_meanwhile(
    tiny_pipeline, swap, swapped_first, copied_by
):
    unet = tiny_pipeline.unet
    before = call_unet(unet)
    enable_ether_attention(unet)
    if swapped_first:
        SWAPS[swap](unet)
    copied = COPIES[copied_by](unet)
    if not swapped_first:
        SWAPS[swap](copied)
    for model in (copied, unet):
        disable_ether_attention(model)
        processors = list(model.attn_processors.values())
        processors += (getattr(model, "original_attn_processors", None) or {}).values()
        assert not any(isinstance(processor, EtherAttnProcessor) for processor in processors)
        assert not any(intercepted(module) for module in model.modules())
        torch.testing.assert_close(call_unet(model), before)


@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("copied_by", COPIES)
def test_it_does_not_come_back_with_the_projections_that_were_fused_meanwhile(tiny_pipeline, kind, copied_by):
    tiny_pipeline.unet.set_attn_processor(kind())
    enable_ether_attention(tiny_pipeline.unet)
    tiny_pipeline.fuse_qkv_projections(vae=False)
    unet = COPIES[copied_by](tiny_pipeline.unet)
    disable_ether_attention(unet)
    unet.unfuse_qkv_projections()
    assert {type(each) for each in unet.attn_processors.values()} == {kind}


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("model", ["unet", "vae", "controlnet"])
def test_the_default_processors_are_set_with_it_on(tiny_pipeline, processor, model):
    model = ControlNetModel.from_unet(tiny_pipeline.unet) if model == "controlnet" else getattr(tiny_pipeline, model)
    model.set_attn_processor(processor())
    enable_ether_attention(model)
    assert {type(each) for each in model.attn_processors.values()} == {EtherAttnProcessor}
    model.set_default_attn_processor()
    assert {type(each) for each in model.attn_processors.values()} == {AttnProcessor}
    disable_ether_attention(model)
    assert {type(each) for each in model.attn_processors.values()} == {AttnProcessor}


@torch.no_grad()
def test_it_is_compiled_with_the_model():
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    expected = model(**given)
    torch.testing.assert_close(torch.compile(model, backend="eager")(**given), expected)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_copied_model_is_on_its_own(copied_by):
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    copied = copied_by(model)
    torch.testing.assert_close(copied(**given), model(**given))
    layers(copied)[0].ether_u["default"].data.neg_().add_(0.7)
    answer = copied(**given)
    disable_ether_attention(copied)
    torch.testing.assert_close(answer, copied(**given))
    assert not torch.allclose(answer, model(**given), atol=1e-4)


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_a_pipeline_generates_the_same_image(tiny_pipeline_folder, method):
    pipe = adapt(open_pipeline(tiny_pipeline_folder), method)
    stock = generate(pipe)
    before = snapshot(pipe)
    enable_ether_attention(pipe.unet)
    assert abs(generate(pipe) - stock).max() <= 1 / 255
    halved = generate(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.fuse_ether()
    assert abs(generate(pipe) - stock).max() <= 1 / 255
    pipe.unfuse_ether()
    disable_ether_attention(pipe.unet)
    assert abs(generate(pipe, cross_attention_kwargs={"scale": 0.5}) - halved).max() <= 1 / 255
    assert snapshot(pipe)["unet"][0] == before["unet"][0]


def test_models_without_stock_attention_and_unknown_backends_are_told_so():
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no attention with a stock.*JointAttnProcessor2_0"):
        enable_ether_attention(model)
    with pytest.raises(ValueError, match="attention backend 'flash': there are sdpa, xformers"):
        EtherAttnProcessor("flash")


@pytest.mark.parametrize("call", [enable_ether_attention, disable_ether_attention])
def test_a_pipeline_in_place_of_a_model_is_told_which_model_to_pass(tiny_pipeline, call):
    processors = dict(tiny_pipeline.unet.attn_processors)
    name = call.__name__
    with pytest.raises(ValueError, match=rf"{name}: got a StableDiffusionPipeline, needs .*: {name}\(pipe.unet\)"):
        call(tiny_pipeline)
    assert tiny_pipeline.unet.attn_processors == processors


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_without_xformers_one_is_told_how_to_get_it():
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[xformers\]'"):
        enable_ether_attention(block("self"), "xformers")


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None or not torch.cuda.is_available(), reason="needs xformers and a GPU"
)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("mask", [False, True])
@torch.no_grad()
def test_xformers_answers_as_sdpa_does(kind, mask):
    model, given = block(kind).cuda(), {name: tensor.cuda() for name, tensor in inputs(kind, mask).items()}
    stock = model(**given)
    enable_ether_attention(model, "xformers")
    torch.testing.assert_close(model(**given), stock, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("component", ["unet", "vae"])
@pytest.mark.parametrize("adapted", [False, True])
def test_fused_projections_are_named_with_the_call_that_parts_them(tiny_pipeline, component, adapted):
    model = getattr(tiny_pipeline, component)
    model.fuse_qkv_projections()
    if adapted:
        model.add_adapter(EtherConfig(target_modules=["to_out.0"]), adapter_name="dog")
    with pytest.raises(
        ValueError, match="enable_ether_attention: the projections .* call unfuse_qkv_projections first"
    ):
        enable_ether_attention(model)
    model.unfuse_qkv_projections()
    enable_ether_attention(model)
