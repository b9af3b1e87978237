"""One layer: Linear and Conv2d of every geometry, against the dense oracle, in every state a PEFT layer can be in."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import make, oracle, oracle_weight
from peft import PeftModel, get_peft_model
from torch import nn

from ether_diffusion import EtherConfig, EtherLayer, EtherModel
from ether_diffusion.tuner.layer import EtherConv2d, EtherLinear

METHODS = [("ether", "input"), ("ether_plus", "input"), ("ether_plus", "both")]
CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
]


def cases():
    for method, sides in METHODS:
        yield pytest.param(lambda: nn.Linear(8, 12), (3, 5, 8), method, sides, id=f"linear-{method}-{sides}")
        yield pytest.param(lambda: nn.Linear(8, 4, bias=False), (8,), method, sides, id=f"vector-{method}-{sides}")
        for options in CONVOLUTIONS:
            name = "-".join(map(str, options.values()))
            yield pytest.param(
                lambda options=options: nn.Conv2d(4, 6, **options), (2, 4, 7, 9), method, sides,
                id=f"conv-{name}-{method}-{sides}",
            )  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "method", "sides"), list(cases()))
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("frozen", [True, False])
def test_forward_gradients_and_merge_follow_the_dense_definition(build, shape, method, sides, strength, frozen):
    layer = make(build().double().requires_grad_(not frozen), method, sides)
    layer.set_scale("default", strength)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = oracle(layer, x, ["default"])
    result = layer(x)
    torch.testing.assert_close(result, expected)

    mask = torch.randn_like(result)
    inputs = [x, *layer.vectors("default").named().values()]
    ours, theirs = (torch.autograd.grad((y * mask).sum(), inputs) for y in (result, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)

    pristine = layer.get_base_layer().weight.detach().clone()
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(pristine + delta, oracle_weight(layer, ["default"]))
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, pristine)


@pytest.mark.parametrize("first", METHODS)
@pytest.mark.parametrize("second", METHODS)
def test_several_adapters_compose_in_the_order_of_their_activation(first, second):
    layer = make(nn.Linear(8, 12).double(), *first, name="a")
    layer.update_layer("b", EtherConfig(method=second[0], sides=second[1], num_blocks=4, init_weights=False))
    layer.set_scale("b", 0.6)
    x = torch.randn(3, 8, dtype=torch.float64)
    for order in (["a", "b"], ["b", "a"], ["b"]):
        layer.set_adapter(order)
        torch.testing.assert_close(layer(x), oracle(layer, x, order))
        layer.merge()
        torch.testing.assert_close(layer(x), oracle(layer, x, order))
        layer.unmerge()
    layer.set_adapter(["a", "b"])
    forward = layer(x)
    layer.set_adapter(["b", "a"])
    assert not torch.allclose(layer(x), forward)


def test_strength_zero_is_the_base_bit_for_bit_even_where_the_adapter_is_broken():
    layer = make(nn.Linear(8, 8), "ether_plus", "both")
    x = torch.randn(2, 8)
    with torch.no_grad():
        layer.ether_u["default"].fill_(float("nan"))
    layer.set_scale("default", 0.0)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_call_factors_multiply_and_are_undone():
    layer = make(nn.Linear(8, 8))
    layer.set_scale("default", 0.8)
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(0.4)
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(0.8)
    layer.scale_layer(0.5)
    layer.scale_layer(0.0)
    layer.unscale_layer()
    assert layer.scaling["default"] == 0.8
    layer.scale_layer(0.0)
    layer.set_scale("default", 1.0)  # how diffusers ends a call with scale 0
    assert layer.scaling["default"] == 0.8
    layer.set_scale("unknown", 0.3)
    assert set(layer.scaling) == {"default"}


def test_a_factor_of_every_step_leaves_no_rounding_behind():
    layer = make(nn.Linear(8, 8))
    for strength in torch.rand(50, dtype=torch.float64).tolist():
        layer.set_scale("default", strength)
        for factor in (0.1, 0.3, 0.7):
            layer.scale_layer(factor)
            layer.unscale_layer(factor)
            assert layer.scaling["default"] == strength


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_layers_answer_in_half_precision_with_float32_vectors(dtype, method):
    layer = make(nn.Linear(64, 32), *method)
    exact = layer(x := torch.randn(16, 64))
    half = copy.deepcopy(layer)
    half.get_base_layer().to(dtype)
    answer = half(x.to(dtype))
    assert answer.dtype == dtype
    assert all(vector.dtype == torch.float32 for vector in half.vectors("default").named().values())
    assert F.cosine_similarity(answer.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.float16)])
def test_casting_a_model_to_half_precision_leaves_the_vectors_in_float32(cast):
    model = nn.Sequential(make(nn.Linear(8, 8), "ether_plus", "both"))
    model(torch.randn(2, 8)).sum().backward()
    before = {name: (v.detach().clone(), v.grad.clone()) for name, v in model[0].vectors("default").named().items()}
    parameters = list(model[0].ether_u.values())
    cast(model)
    assert model[0].weight.dtype in (torch.float16, torch.bfloat16)
    for name, vector in model[0].vectors("default").named().items():
        assert torch.equal(vector, before[name][0]) and torch.equal(vector.grad, before[name][1])
    assert model[0].ether_u["default"] is parameters[0]  # an optimizer made before still trains it
    assert model.double()[0].ether_u["default"].dtype == torch.float64


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def dtypes_of(model: nn.Module, name: str) -> set[torch.dtype]:
    layers = [layer for layer in model.modules() if isinstance(layer, EtherLayer) and name in layer.ether_u]
    return {vector.dtype for layer in layers for vector in layer.vectors(name).named().values()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [nn.Linear(8, 12), nn.Conv2d(8, 12, 3)], ids=["linear", "convolution"])
def test_vectors_are_in_the_dtype_of_the_base_for_those_who_ask(dtype, method, base):
    layer = make(copy.deepcopy(base).to(dtype), *method)
    usual, exact = torch.promote_types(dtype, torch.float32), layer.vectors("default").named()
    layer.update_layer("other", EtherConfig(method=method[0], sides=method[1], init_weights=False))
    layer.set_autocast("default", False)
    assert dtypes_of(layer, "default") == {dtype} and dtypes_of(layer, "other") == {usual}
    for name, vector in layer.vectors("default").named().items():
        assert torch.equal(vector, exact[name].to(dtype)) and vector.requires_grad
    x = torch.randn(2, 8, 5, 5, dtype=dtype) if isinstance(base, nn.Conv2d) else torch.randn(3, 8, dtype=dtype)
    answer = layer(x)
    answer.float().square().mean().backward()
    assert answer.dtype == dtype and all(
        torch.isfinite(v.grad).all() for v in layer.vectors("default").named().values()
    )
    expected = oracle(copy.deepcopy(layer).double(), x.double(), ["default"])
    assert F.cosine_similarity(answer.double().flatten(), expected.flatten(), dim=0) > 0.999
    for cast in DTYPES:  # `model.half()` and the like: only these follow all the way
        layer.to(cast)
        assert dtypes_of(layer, "default") == {cast}
        assert dtypes_of(layer, "other") <= {torch.float32, torch.float64}
    layer.to(dtype).set_autocast("default", True)
    assert dtypes_of(layer, "default") <= {torch.float32, torch.float64}
    layer.delete_adapter("default")
    assert list(layer.autocast) == ["other"]


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_vectors_are_never_in_a_dtype_that_only_stores(storage):
    layer = make(nn.Linear(8, 12).requires_grad_(False), "ether_plus")
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(storage)
    layer.set_autocast("default", False)
    assert dtypes_of(layer, "default") == {torch.float32}
    layer.to(storage)
    assert dtypes_of(layer, "default") == {torch.float32}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_peft_puts_vectors_in_the_dtype_that_it_is_asked_for(dtype, autocast, tmp_path):
    config = EtherConfig(method="ether_plus", target_modules=["0"])
    expected = dtype if not autocast or dtype == torch.float64 else torch.float32
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)).to(dtype), config, autocast_adapter_dtype=autocast)
    assert dtypes_of(model, "default") == {expected}
    model.add_adapter("second", config, autocast_adapter_dtype=autocast)
    model.add_adapter("third", config, autocast_adapter_dtype=not autocast)
    assert dtypes_of(model, "second") == dtypes_of(model, "default") == {expected}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    for low_cpu_mem_usage in (False, True):
        base, options = nn.Sequential(nn.Linear(8, 8)).to(dtype), {"low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast, **options)
        assert dtypes_of(loaded, "default") == {expected}
        loaded.load_adapter(tmp_path, "more", autocast_adapter_dtype=autocast, **options)
        assert dtypes_of(loaded, "more") == {expected}
    tuner = EtherModel(nn.Sequential(nn.Linear(8, 8)).to(dtype), config, "default")
    tuner.peft_config["second"] = config
    tuner.inject_adapter(tuner.model, "second", autocast_adapter_dtype=autocast)
    assert dtypes_of(tuner, "second") == {expected}


@pytest.mark.parametrize("method", METHODS)
def test_autocast_reflects_in_float32(method):
    layer = make(nn.Linear(64, 32), *method)
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        answer = layer(x)
    assert answer.dtype == torch.bfloat16
    answer.float().square().sum().backward()
    assert all(vector.grad.dtype == torch.float32 for vector in layer.vectors("default").named().values())
    torch.testing.assert_close(answer.float(), layer(x), rtol=0.05, atol=0.05)


def test_the_start_of_ether_is_a_unit_vector_and_that_of_ether_plus_the_identity():
    for n in (1, 4):
        ether = EtherLinear(nn.Linear(8, 12), "default", EtherConfig(num_blocks=n))
        plus = EtherLinear(nn.Linear(8, 12), "default", EtherConfig(method="ether_plus", num_blocks=n))
        for vector in (*ether.vectors("default").named().values(), *plus.vectors("default").named().values()):
            torch.testing.assert_close(vector.norm(dim=-1), torch.ones(n))
        x = torch.randn(3, 8)
        torch.testing.assert_close(plus(x), plus.base_layer(x), rtol=1e-5, atol=1e-5)
        assert (ether(x) - ether.base_layer(x)).abs().max() > 1e-3
        optimizer = torch.optim.SGD(plus.parameters(), lr=0.1)
        plus(x).square().sum().backward()
        optimizer.step()
        assert (plus(x) - plus.base_layer(x)).abs().max() > 1e-4


def test_the_start_follows_pytorchs_seed():
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(EtherLinear(nn.Linear(8, 8), "default", EtherConfig()).ether_u["default"].clone())
    # The base layer's own initialisation draws first, so equal seeds are equal as a whole.
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (
            nn.Linear(320, 8),
            {"num_blocks": 7},
            r"num_blocks=7 does not divide the input dimension 320; try 1, 2, 4, 5",
        ),
        (nn.Linear(8, 9), {"num_blocks": 2, "method": "ether_plus"}, r"the output dimension 9; try 1, 3, 9"),
        (nn.Conv2d(6, 6, 3), {"num_blocks": 4}, r"the input dimension 6; try 1, 2, 3, 6"),
    ],
)
def test_blocks_that_do_not_fit_are_named_with_those_that_do(base, config, message):
    kind = EtherConv2d if isinstance(base, nn.Conv2d) else EtherLinear
    with pytest.raises(ValueError, match=f"mid.to_q: .*{message}"):
        kind(base, "default", EtherConfig(**config), layer_name="mid.to_q")


def test_grouped_convolutions_are_refused():
    base = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match=r"mid.conv: .*grouped convolutions \(groups=2\).*exclude the layer"):
        EtherConv2d(base, "default", EtherConfig(), layer_name="mid.conv")


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_compiles_without_a_graph_break(method):
    layer = make(nn.Linear(8, 12), *method)
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_forward_keeps_no_state():
    layer = make(nn.Linear(8, 8), "ether_plus", "both")
    before = {k: v for k, v in layer.__dict__.items() if not k.startswith("_")}
    layer(torch.randn(2, 8))
    assert {k: v for k, v in layer.__dict__.items() if not k.startswith("_")} == before


def test_vectors_in_any_memory_layout_give_the_same_answer():
    layer, x = make(nn.Linear(8, 8), "ether_plus", "both"), torch.randn(3, 8)
    expected = layer(x)
    for name in layer.adapter_layer_names:
        vector = getattr(layer, name)["default"]
        vector.data = vector.data.T.contiguous().T
        assert not vector.is_contiguous()
    torch.testing.assert_close(layer(x), expected)
