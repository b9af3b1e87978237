"""PEFT's batches of mixed adapters: `adapter_names` gives each row of a batch an adapter of its own."""

import pytest
import torch
from helpers.layers import make, oracle
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.mixed_batch import BASE

CASES = {
    "linear": (lambda: nn.Linear(8, 12), (5, 3, 8)),
    "linear without a bias": (lambda: nn.Linear(8, 12, bias=False), (5, 8)),
    "linear with a hook": (lambda: hooked(nn.Linear(8, 12)), (5, 3, 8)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (5, 4, 7, 6)),
}


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


OTHER = {"method": "ether_plus", "num_blocks": 1, "init_weights": False}


def two_adapters(base, strength=0.7):
    layer = make(base.double())
    layer.update_layer("other", EtherConfig(**OTHER))
    layer.set_scale("other", strength)
    return layer


@pytest.mark.parametrize("case", CASES)
@given(names=st.lists(st.sampled_from(["default", "other", BASE, "elsewhere"]), min_size=5, max_size=5))
def test_each_row_has_its_own_adapter_whichever_is_active(case, names):
    base, shape = CASES[case]
    layer, x = two_adapters(base()), torch.randn(shape).double()
    y = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        expected = oracle(layer, x[row : row + 1], [name] if name in layer.ether_u else [])
        torch.testing.assert_close(y[row : row + 1], expected)


@pytest.mark.parametrize("strength", [0.0, -1.5, 2.0])
def test_strengths_are_those_of_the_adapter_or_of_the_row(strength):
    layer, x = two_adapters(nn.Linear(8, 12), strength), torch.randn(2, 8).double()
    torch.testing.assert_close(layer(x, adapter_names=["other"] * 2), oracle(layer, x, ["other"]))
    y = layer(x, adapter_names=["other"] * 2, adapter_strengths=[strength, 1.0])
    torch.testing.assert_close(y[0], oracle(layer, x, ["other"])[0])
    layer.set_scale("other", 1.0)
    torch.testing.assert_close(y[1], oracle(layer, x, ["other"])[1])


def test_names_that_are_not_one_for_each_row_are_refused():
    layer = two_adapters(nn.Linear(8, 12))
    with pytest.raises(ValueError, match="2 names for a batch of 3 rows"):
        layer(torch.randn(3, 8).double(), adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="8 names for a batch of no rows"):
        layer(torch.randn(8).double(), adapter_names=["default"] * 8)
    layer.merge()
    with pytest.raises(ValueError, match="default is merged"):
        layer(torch.randn(3, 8).double(), adapter_names=["default"] * 3)


def test_layers_in_bfloat16_and_under_autocast():
    layer, x = make(nn.Linear(8, 12)), torch.randn(3, 8)
    expected = layer(x, adapter_names=["default", BASE, "default"])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            layer(x, adapter_names=["default", BASE, "default"]).float(), expected, atol=0.05, rtol=0.05
        )
    layer.to(torch.bfloat16)
    found = layer(x.bfloat16(), adapter_names=["default", BASE, "default"])
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


def test_disabled_adapters_are_in_no_row():
    layer, x = two_adapters(nn.Linear(8, 12)), torch.randn(2, 8).double()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x, adapter_names=["default", "other"]), layer.base_layer(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def peft_model() -> PeftModel:
    torch.manual_seed(0)
    config = EtherConfig(target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(Net(), config)
    model.add_adapter("other", EtherConfig(target_modules=["second"], **OTHER))
    return model.eval()


def test_a_peft_model_takes_the_names():
    model, x = peft_model(), torch.randn(3, 8)
    y = model(x, adapter_names=["other", BASE, "default"])
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(y[row], model(x)[row])
    with model.disable_adapter():
        torch.testing.assert_close(y[1], model(x)[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_peft_model_refuses_unknown_names_and_training():
    model, x = peft_model(), torch.randn(2, 8)
    with pytest.raises(ValueError, match="no adapter dgo; there are default, other and __base__"):
        model(x, adapter_names=["dgo", "other"])
    with pytest.raises(ValueError, match="a list with a name for each row"):
        model(x, adapter_names="other")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train()(x, adapter_names=["other", "default"])


def test_a_lora_below_has_the_rows_that_name_it():
    model, x = Net().eval(), torch.randn(3, 8)
    base = model.first(x)
    lora = LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    inject_adapter_in_model(lora, model, "lora")
    expected = {BASE: base, "lora": model.first(x)}
    inject_adapter_in_model(EtherConfig(target_modules=["first"], init_weights=False), model, "ether")
    model.first.base_layer.set_adapter([])
    expected["ether"] = model.first(x)
    names = ["lora", BASE, "ether"]
    y = model.first(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], expected[name][row])
