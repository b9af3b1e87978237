"""ETHER held to what PEFT asks of every method: behaviours × models × configs, through PEFT's own entry points."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.small_models import CASES, MLP, build, inputs
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ether_diffusion import EtherConfig, EtherLayer, EtherModel
from ether_diffusion.tuner.config import ETHER
from ether_diffusion.tuner.model import register

grid = pytest.mark.parametrize("case", CASES)


@grid
def test_the_adapter_changes_the_output_and_only_its_own_parameters_train(case):
    base, model = build(case)
    assert not torch.allclose(model(inputs()), base(inputs()), atol=1e-5)
    saved = CASES[case][1].get("modules_to_save", [])
    for name, parameter in model.named_parameters():
        own = ".ether_" in name or any(f"{s}.modules_to_save.default" in name for s in saved)
        assert parameter.requires_grad == own, name


@grid
def test_training_moves_the_adapter_and_leaves_the_base(case):
    base, model = build(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        unused = ".emb." in name and parameter.grad is None
        assert torch.equal(parameter, before[name]) != (parameter.requires_grad and not unused), name


@grid
def test_what_is_saved_loads_to_the_same_output(case, tmp_path):
    base, model = build(case)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()
        assert torch.equal(loaded(inputs()), model(inputs()))
        trainable = any(p.requires_grad for p in loaded.parameters())
        assert trainable == options.get("is_trainable", False)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, EtherConfig) and config.peft_type == "ETHER" and config.inference_mode
    assert (config.method, config.num_blocks) == (
        CASES[case][1].get("method", "ether"),
        CASES[case][1].get("num_blocks", 1),
    )


@grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_output_and_unmerging_the_weights(case, dtype, safe_merge):
    base, model = build(case, dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    unmerged = model(inputs())
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(inputs()), unmerged, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(model(inputs()), unmerged)
    alone = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(m, EtherLayer) for m in alone.modules())
    assert alone.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(alone(inputs()), unmerged, rtol=tolerance, atol=tolerance)


@grid
def test_unloading_brings_the_base_back(case):
    base, model = build(case)
    alone = model.unload()
    assert alone.state_dict().keys() == base.state_dict().keys()
    if "modules_to_save" not in CASES[case][1]:
        assert torch.equal(alone(inputs()), base(inputs()))


@grid
def test_a_disabled_context_answers_as_the_base_and_restores_the_state(case):
    base, model = build(case)
    adapted = model(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base(inputs()))
    assert torch.equal(model(inputs()), adapted)
    model.merge_adapter()
    merged = model(inputs())
    with model.disable_adapter():
        if "modules_to_save" not in CASES[case][1]:
            assert torch.equal(model(inputs()), base(inputs()))
    assert torch.equal(model(inputs()), merged)


def test_a_disabled_context_within_disabled_adapters_leaves_them_disabled():
    base, model = build("mlp")
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(inputs()), base(inputs()))


@grid
def test_a_second_adapter_is_added_switched_combined_and_deleted(case):
    base, model = build(case)
    kind, fields = CASES[case]
    if "modules_to_save" in fields:
        fields = {k: v for k, v in fields.items() if k != "modules_to_save"}
    first = model(inputs())
    model.add_adapter("other", EtherConfig(init_weights=False, **fields))
    assert torch.equal(model(inputs()), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".other"))
    model.set_adapter("other")
    second = model(inputs())
    assert not torch.allclose(second, first, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ether_" in n and n.endswith(".default"))
    if "modules_to_save" not in CASES[case][1]:
        model.base_model.set_adapter(["default", "other"])
        both = model(inputs())
        model.merge_adapter(["default", "other"])
        torch.testing.assert_close(model(inputs()), both, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert "other" not in model.peft_config and not any("other" in n for n, _ in model.named_parameters())
    assert torch.equal(model(inputs()), first)


def test_deleting_the_active_adapter_activates_another():
    _, model = build("mlp")
    model.add_adapter("other", EtherConfig(target_modules=["lin0"], init_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    model(inputs())


def test_gradients_can_be_switched_per_adapter():
    _, model = build("mlp")
    model.add_adapter("other", EtherConfig(target_modules=["lin0"]))
    model.base_model.set_requires_grad("other", True)
    model.base_model.set_requires_grad("default", False)
    wanted = {n: n.endswith(".other") for n, _ in model.named_parameters() if ".ether_" in n}
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".ether_" in n} == wanted


def test_state_dicts_go_out_and_in():
    base, model = build("mlp-plus")
    state = get_peft_model_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {"ether_u", "ether_v", "ether_u_out", "ether_v_out"}
    other = get_peft_model(
        copy.deepcopy(base), EtherConfig(method="ether_plus", target_modules=["lin0", "lin1"])
    ).eval()
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(other(inputs()), model(inputs()))


def test_vectors_made_without_memory_are_filled_by_loading():
    base, model = build("mlp-plus")
    empty = get_peft_model(
        copy.deepcopy(base), EtherConfig(method="ether_plus", target_modules=["lin0", "lin1"]), low_cpu_mem_usage=True
    ).eval()
    assert {p.device.type for n, p in empty.named_parameters() if ".ether_" in n} == {"meta"}
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(empty(inputs()), model(inputs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["mlp-plus", "conv-plus-n2"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_half_precision_model_trains_float32_vectors_or_its_own_and_loads_them_again(
    case, dtype, autocast_adapter_dtype, tmp_path
):
    torch.manual_seed(0)
    kind, config = CASES[case]
    base = kind().to(dtype).eval()
    model = get_peft_model(
        copy.deepcopy(base), EtherConfig(init_weights=False, **config), autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    answer = model(inputs())
    assert answer.dtype == dtype
    answer.float().square().mean().backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert torch.equal(loaded(inputs()), answer)
    for some in (model, loaded):
        vectors = [p for n, p in some.named_parameters() if ".ether_" in n]
        assert vectors and {v.dtype for v in vectors} == {torch.float32 if autocast_adapter_dtype else dtype}
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if ".ether_" in n)


def test_injection_without_a_wrapper_works():
    model = inject_adapter_in_model(EtherConfig(target_modules=["lin0"]), MLP())
    assert isinstance(model, MLP) and isinstance(model.lin0, EtherLayer)


@pytest.mark.parametrize("bias", ["all", "ether_only"])
def test_biases_train_where_asked(bias):
    _, model = build("mlp", bias=bias)
    training = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    adapted = {"base_model.model.lin0.base_layer.bias"}
    every = adapted | {"base_model.model.lin1.bias", "base_model.model.norm.bias"}
    assert training == (every if bias == "all" else adapted)


def test_only_the_chosen_layers_are_adapted():
    _, model = build("second-layer-only")
    assert [n for n, m in model.named_modules() if isinstance(m, EtherLayer)] == [
        "base_model.model.stack.layers.1.lin0"
    ]


def test_a_target_that_is_not_there_or_cannot_be_adapted_is_an_error():
    with pytest.raises(ValueError, match="nothing_like_this"):
        get_peft_model(MLP(), EtherConfig(target_modules=["nothing_like_this"]))
    with pytest.raises(TypeError, match="norm: LayerNorm cannot carry ETHER"):
        get_peft_model(MLP(), EtherConfig(target_modules=["norm"]))
    with pytest.raises(ValueError, match="no default layers are known for MLP .*pass target_modules"):
        get_peft_model(MLP(), EtherConfig())
    with pytest.raises(ValueError, match="lin0: num_blocks=3 does not divide the input dimension 8"):
        get_peft_model(MLP(), EtherConfig(target_modules=["lin0"], num_blocks=3))


@pytest.mark.parametrize("ether_first", [True, False])
def test_lora_and_ether_on_one_model_are_composed_in_the_order_of_loading(ether_first):
    torch.manual_seed(0)
    base = MLP().double()
    ether = EtherConfig(target_modules=["lin0"], init_weights=False)
    lora = LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model = copy.deepcopy(base)
    for config in (ether, lora) if ether_first else (lora, ether):
        inject_adapter_in_model(config, model)
    layers = {type(m).__module__.split(".")[0]: m for m in model.modules() if hasattr(m, "base_layer")}
    reflection, lora_layer = layers["ether_diffusion"], layers["peft"]
    u = reflection.ether_u["default"].double()
    matrix = torch.eye(8).double() - 2 * u.T @ u / (u @ u.T)
    change = lora_layer.get_delta_weight("default").double()
    weight = base.lin0.weight
    expected = weight @ matrix + change if ether_first else (weight + change) @ matrix
    x = inputs().double()
    torch.testing.assert_close(model.lin0(x), x @ expected.T + base.lin0.bias)


def test_merging_into_a_weight_below_an_unmerged_lora_is_refused():
    model = MLP()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False), model)
    inject_adapter_in_model(EtherConfig(target_modules=["lin0"]), model)
    with pytest.raises(ValueError, match="merging into the weight would drop it"):
        model.lin0.merge()


def test_registration_is_idempotent_and_known_to_peft():
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ETHER"] is EtherConfig
    assert ETHER.value == "ETHER" and EtherModel.prefix == "ether_"


def test_peft_reports_the_state_of_model_and_layers():
    _, model = build("mlp-both-layers-n4")
    model.merge_adapter()
    status = model.get_model_status()
    assert status.peft_types == {"default": "ETHER"} and status.adapter_model_type == "EtherModel"
    assert (status.trainable_params, status.num_adapter_layers, status.merged_adapters) == (24, 2, ["default"])
    assert [layer.requires_grad for layer in model.get_layer_status()] == [{"default": True}] * 2
    assert "ether.EtherLinear" in repr(model)


def test_copied_and_pickled_models_are_on_their_own():
    _, model = build("mlp-plus")
    answer = model(inputs())
    model.merge_adapter()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.unmerge_adapter()
        assert torch.equal(twin(inputs()), answer)
        with torch.no_grad():
            twin.base_model.model.lin0.ether_u["default"].normal_()
        assert not torch.allclose(twin(inputs()), answer)
    model.unmerge_adapter()
    assert torch.equal(model(inputs()), answer)


def test_a_merged_adapter_is_not_deleted():
    _, model = build("mlp")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_merging_chosen_adapters_and_unloading_keeps_those_alone():
    base, model = build("mlp")
    model.add_adapter("other", EtherConfig(target_modules=["lin0", "lin1"], init_weights=False))
    model.set_adapter("other")
    other = model(inputs())
    model.set_adapter("default")
    alone = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(alone(inputs()), other, rtol=1e-5, atol=1e-5)


def test_adapters_on_different_layers_work_side_by_side():
    _, model = build("mlp")
    model.add_adapter("other", EtherConfig(target_modules=["lin1"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = model(inputs())
    model.set_adapter("default")
    first = model(inputs())
    assert not torch.allclose(both, first, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    torch.testing.assert_close(model(inputs()), both, rtol=1e-5, atol=1e-5)


def test_auto_model_finds_the_base_of_a_saved_adapter(tmp_path):
    from transformers import BertConfig, BertModel

    base = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), EtherConfig(init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
