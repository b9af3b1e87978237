"""EtherAttnProcessor: the stock processor's answer, by fewer products, whatever is done to the adapters."""

import copy
import importlib.util

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from helpers.pipelines import adapt, generate, open_pipeline, snapshot

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.attention import EtherAttnProcessor, disable_ether_attention, enable_ether_attention

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
        for _ in range(2):  # made, and kept
            torch.testing.assert_close(model(**given), stock)
    assert bool(model.attn.processor._kept) is not grad


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


@torch.no_grad()
def test_self_attention_projects_with_one_product_and_makes_the_weights_once(monkeypatch):
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    model(**given)
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: (calls.append(a[1].shape), linear(*a))[1])
    monkeypatch.setattr("ether_diffusion.tuner.layer.EtherLayer.adapted_weight", None)
    model(**given)
    assert calls == [(72, 24), (24, 24)]


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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("within", ["the model", "the block alone"])
@torch.no_grad()
def test_what_is_kept_follows_every_change(change, within):
    model = block("self")
    enable_ether_attention(model)
    given = inputs("self")
    call = model if within == "the model" else model.attn
    before = call(**given)
    torch.manual_seed(5)
    CHANGES[change](model)
    given = {name: tensor.to(layers(model)[0].base_layer.weight.dtype) for name, tensor in given.items()}
    after = call(**given)
    disable_ether_attention(model)
    tolerance = {"rtol": 0.05, "atol": 0.02} if after.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(after, call(**given), **tolerance)
    if change not in ("merging", "half precision"):
        assert not torch.allclose(after, before, atol=1e-4)


def test_training_goes_through_the_layers_and_inference_after_it_sees_the_result():
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


def test_gradients_flow_through_kept_weights_to_what_comes_before():
    model, given = block("self"), inputs("self")
    model.requires_grad_(False)
    x = given["hidden_states"].requires_grad_()
    stock = torch.autograd.grad(model(x).square().sum(), x)[0]
    enable_ether_attention(model)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], stock)
    assert model.attn.processor._kept


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_taking_it_off_leaves_nothing_behind(processor):
    model = block("self")
    model.attn.processor = processor()
    enable_ether_attention(model)
    enable_ether_attention(model)
    model(**inputs("self"))
    disable_ether_attention(model)
    assert type(model.attn.processor) is processor
    assert not model._forward_hooks and not model._forward_pre_hooks


@torch.no_grad()
def test_a_copied_model_is_on_its_own():
    model, given = block("self"), inputs("self")
    enable_ether_attention(model)
    model(**given)
    copied = copy.deepcopy(model)
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


def test_vectors_that_were_given_transposed_are_watched_like_others(trained, tiny_pipeline_folder):
    vectors = {key: tensor.T.contiguous().T for key, tensor in trained.ether_state_dict().items()}
    assert not any(tensor.is_contiguous() for tensor in vectors.values())
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(vectors)
    stock = generate(pipe)
    enable_ether_attention(pipe.unet)
    assert abs(generate(pipe) - stock).max() < 1e-4
