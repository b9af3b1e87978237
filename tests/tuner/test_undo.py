"""What raises half way leaves models as they were, bit for bit."""

import pytest
import torch
from helpers.pipelines import adapt, assert_unchanged, generate, snapshot
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.tuner.undo import restored_on_error

LATE = {"unet": ["to_q", "conv_norm_out"], "text_encoder": ["q_proj", "final_layer_norm"]}
"""Layers that can be adapted, and one that cannot, which comes after them."""
WAYS = {
    "add_adapter": lambda model, config: model.add_adapter(config, adapter_name="cat"),
    "inject_adapter_in_model": lambda model, config: inject_adapter_in_model(config, model, "cat"),
    "get_peft_model": lambda model, config: get_peft_model(model, config, "cat"),
}


@pytest.mark.parametrize("component", list(LATE))
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_fits_some_layers_alone_is_put_on_none(tiny_pipeline, component, way, first):
    model = getattr(tiny_pipeline, component)
    if not first:
        adapt(tiny_pipeline, name="dog")
    before, image = snapshot(tiny_pipeline), generate(tiny_pipeline)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TypeError, match="cannot carry ETHER"):
        WAYS[way](model, EtherConfig(target_modules=LATE[component]))
    assert_unchanged(tiny_pipeline, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert (generate(tiny_pipeline) == image).all()
    model.add_adapter(EtherConfig(target_modules=LATE[component][:1]), adapter_name="bird")


def replace(model: nn.Module) -> None:
    model[0] = nn.Identity()


def rename(model: nn.Module) -> None:
    model.extra = [1]
    model.names.append("more")
    model.table["key"] = 2
    del model.gone


def write(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].weight.mul_(2)


def cast(model: nn.Module) -> None:
    model.half()
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [replace, rename, write, cast])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("made", [True, False])
def test_whatever_is_done_to_a_model_is_undone(change, error, made):
    with torch.inference_mode(made):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.names, model.table, model.gone = ["one"], {}, 3
    modules, names, weights = list(model), model.names, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error), restored_on_error([model], [model[1].weight]), torch.inference_mode(made):
        change(model)
        raise error
    assert list(model) == modules and model.names is names and names == ["one"] and model.table == {}
    assert model.gone == 3 and not hasattr(model, "extra")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_ends_well_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with restored_on_error([model], [model[1].weight]):
        replace(model)
        cast(model)
    assert isinstance(model[0], nn.Identity) and model[1].weight.dtype == torch.float16
