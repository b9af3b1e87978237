"""Modules that an adapter replaces: held in its file, loaded in place, put back."""

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
)
from helpers import zoo
from helpers.control import IMAGE, WHOLE, content, same
from helpers.pipelines import generate

from ether_diffusion import (
    EtherFileError,
)
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.adapters.writing import write_adapter_file


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, state) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def nets(tiny_pipeline) -> tuple[StableDiffusionControlNetPipeline, StableDiffusionControlNetPipeline]:
    """A trained ControlNet pipeline, and one with other weights in the modules that are trained as a whole."""
    trained, fresh = zoo.controlnet(tiny_pipeline), zoo.controlnet(tiny_pipeline)
    with torch.no_grad():
        for name, parameter in trained.controlnet.named_parameters():
            if name.startswith(tuple(WHOLE)):
                parameter.add_(0.1)
    return trained, fresh


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "modules alone"])
@pytest.mark.parametrize("undo", ["unload", "delete"])
def test_replaced_modules_are_loaded_in_place_and_put_back(nets, tmp_path, vectors, undo):
    trained, fresh = nets
    if vectors:
        zoo.adapt_components(trained, "controlnet", num_blocks=2, target_modules=["to_q"])
    path = trained.save_ether_weights(tmp_path, "default", replaced_modules={"controlnet": WHOLE})
    before, attributes = state_of(fresh.controlnet), set(fresh.controlnet.__dict__)
    parameters = dict(fresh.controlnet.named_parameters())
    fresh.load_ether_weights(path, "edges")
    after = dict(fresh.controlnet.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items() if name in after)
    assert same(generate(fresh, image=IMAGE), generate(trained, image=IMAGE))
    assert content(fresh.save_ether_weights(tmp_path / "b")) == content(path)
    with pytest.raises(ValueError, match="adapter 'edges', and only one adapter can replace modules"):
        fresh.load_ether_weights(path, "second")
    with pytest.raises(ValueError, match="'edges' is already on"):
        fresh.load_ether_weights(path, "edges")
    fresh.unload_ether_weights() if undo == "unload" else fresh.delete_adapters("edges")
    assert_state(fresh.controlnet, before)
    assert set(fresh.controlnet.__dict__) == attributes


def test_a_pipeline_without_the_component_or_another_architecture_is_refused(nets, tiny_pipeline, tmp_path):
    trained, fresh = nets
    path = trained.save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    with pytest.raises(EtherFileError, match="adapts controlnet, which this StableDiffusionPipeline does not have"):
        tiny_pipeline.load_ether_weights(path)
    fresh.controlnet.controlnet_mid_block = torch.nn.Conv2d(8, 8, 1)
    before = state_of(fresh.controlnet)
    with pytest.raises(EtherFileError, match=r"controlnet_mid_block.* has shape .* the weight here has \(8"):
        fresh.load_ether_weights(path)
    assert_state(fresh.controlnet, before)
    fresh.controlnet.controlnet_mid_block = torch.nn.Conv2d(32, 32, 1, bias=False)
    with pytest.raises(EtherFileError, match="has no controlnet_mid_block.bias"):
        fresh.load_ether_weights(path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"controlnet": ["conv_of_nothing"]}, "conv_of_nothing does not exist in this ControlNetModel"),
        ({"controlnet": ["mid_block.resnets", "mid_block.resnets.0"]}, "resnets.0 is listed twice"),
        ({"controlnet": "mid_block"}, "a list of module paths"),
        ({"controlnet": []}, "a list of module paths"),
        ({"moon": ["mid_block"]}, "moon.* a list of module paths of one of .*controlnet"),
        ({"controlnet": ["down_blocks"]}, "down_blocks carries an adapter here"),
    ],
)
def test_modules_that_cannot_be_held_whole_are_named(nets, tmp_path, modules, message):
    zoo.adapt_components(nets[0], "controlnet", num_blocks=2, target_modules=["to_q"])
    with pytest.raises(ValueError, match=message):
        nets[0].save_ether_weights(tmp_path, replaced_modules=modules)
    assert not (tmp_path / WEIGHTS_NAME).exists()


def test_what_cannot_be_loaded_again_is_not_written(nets, tmp_path):
    with torch.no_grad():
        nets[0].controlnet.controlnet_mid_block.weight[0, 0] = torch.nan
    with pytest.raises(EtherFileError, match="controlnet_mid_block.weight is not made of finite numbers"):
        nets[0].save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_above_a_replaced_module_must_be_unfused_before_that_is_put_back(nets, tmp_path):
    trained, fresh = nets
    before = state_of(fresh.controlnet)
    path = trained.save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    fresh.load_ether_weights(path, "edges")
    zoo.adapt_components(fresh, "controlnet", num_blocks=2, target_modules=["controlnet_mid_block"], name="above")
    fresh.fuse_ether()
    with pytest.raises(ValueError, match="call unfuse_ether first"):
        fresh.delete_adapters("edges")
    fresh.unload_ether_weights()
    assert_state(fresh.controlnet, before)


def test_a_checkpoint_reads_back_as_it_was_written(nets, tmp_path):
    path = nets[0].save_ether_weights(tmp_path, replaced_modules={"controlnet": WHOLE})
    checkpoint = read_adapter_file(path)
    write_adapter_file(tmp_path / "b.safetensors", checkpoint)
    assert content(tmp_path / "b.safetensors") == content(path)
    assert checkpoint.weights["controlnet"].about == {"modules": WHOLE}
