"""Adapters on pipelines of transformers with flow matching: on the transformer and on every text encoder."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import flow_zoo, zoo
from helpers.flow_images import generate
from helpers.pipelines import ONE_GREY_LEVEL

from ether_diffusion.adapters.components import ether_layers, models_of
from ether_diffusion.tuner.attention import enable_ether_attention

# Of each pipeline: its components that carry adapters, those first that the scale of a call reaches.
SCALED = {
    "flux": ("transformer", "text_encoder", "text_encoder_2"),
    "kontext": ("transformer", "text_encoder", "text_encoder_2"),
    "klein": ("transformer",),
    "flux2": ("transformer",),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "qwen": ("transformer",),
    "z_image": ("transformer",),
    "chroma": ("transformer", "text_encoder"),
    "sana": ("transformer", "text_encoder"),
    "lumina2": ("transformer",),
    "krea2": ("transformer",),
}
UNSCALED = {"klein": "text_encoder", "sd3": "text_encoder_3", "qwen": "text_encoder", "z_image": "text_encoder"}
UNSCALED |= {"flux2": "text_encoder", "lumina2": "text_encoder", "krea2": "text_encoder"}
CARRYING = {name: [*SCALED[name], *filter(None, [UNSCALED.get(name)])] for name in SCALED}
CASES = [
    pytest.param(
        (name, part, method),
        id=f"{name}-{part}-{method}",
        marks=[pytest.mark.slow] * (part != "transformer" and method == "ether"),
    )
    for name, parts in CARRYING.items()
    for part in parts
    for method in ("ether", "ether_plus")
]
CALL = {name: "joint_attention_kwargs" for name in ("flux", "kontext", "sd3", "z_image", "chroma")}


def assert_same(image: np.ndarray, expected: np.ndarray, effect: float) -> None:
    """To a grey level, and to much less than what the adapter changes."""
    assert effect > 1e-4
    assert np.abs(image - expected).max() <= min(ONE_GREY_LEVEL, 0.02 * effect)


def scales_calls(pipe: DiffusionPipeline) -> bool:
    """Whether the transformer takes a scale: that of Z-Image does from diffusers 0.42 on."""
    return any("attention_kwargs" in name for name in inspect.signature(pipe.transformer.forward).parameters)


@dataclass
class Adapted:
    """A stock pipeline's image, and an adapter file of one of its components with the image that it makes."""

    make: Callable[[], DiffusionPipeline]
    name: str
    component: str
    file: Path
    plain: np.ndarray
    image: np.ndarray

    def assert_same(self, image: np.ndarray, expected: np.ndarray) -> None:
        assert_same(image, expected, np.abs(self.image - self.plain).max())

    def load(self) -> DiffusionPipeline:
        pipe = self.make()
        pipe.load_ether_weights(self.file, "dog")
        return pipe


@pytest.fixture(scope="module", params=CASES)
def adapted(request, tmp_path_factory) -> Adapted:
    name, component, method = request.param

    def make() -> DiffusionPipeline:
        return flow_zoo.make(name, tmp_path_factory.mktemp(name))

    pipe = make()
    plain = generate(pipe)
    zoo.adapt_components(pipe, component, method=method)
    file = pipe.save_ether_weights(tmp_path_factory.mktemp("adapter"))
    return Adapted(make, name, component, file, plain, generate(pipe))


def contents(pipe: DiffusionPipeline) -> dict:
    return {
        name: ([(path, type(m)) for path, m in model.named_modules()], set(model.__dict__), model.state_dict())
        for name, model in models_of(pipe).items()
    }


def test_a_file_does_the_same_in_a_stock_pipeline_until_it_is_unloaded(adapted):
    pipe = adapted.make()
    generate(pipe)  # the first call leaves attributes of its own on models
    before = copy.deepcopy(contents(pipe))
    pipe.load_ether_weights(adapted.file)
    adapted.assert_same(generate(pipe), adapted.image)
    pipe.unload_ether_weights()
    after = contents(pipe)
    for name, (modules, attributes, weights) in before.items():
        assert (modules, attributes) == after[name][:2]
        assert weights.keys() == after[name][2].keys()
        assert all(torch.equal(weight, after[name][2][key]) for key, weight in weights.items())
    adapted.assert_same(generate(pipe), adapted.plain)


def test_strength_is_set_by_number_and_by_component(adapted):
    pipe = adapted.load()
    pipe.set_adapters("dog", 0.5)
    half = generate(pipe)
    assert np.abs(half - adapted.image).max() > 1e-5 and np.abs(half - adapted.plain).max() > 1e-5
    pipe.set_adapters(["dog"], [{adapted.component: 0.0}])
    adapted.assert_same(generate(pipe), adapted.plain)
    pipe.set_adapters(["dog"], [{adapted.component: 0.5}])
    adapted.assert_same(generate(pipe), half)


def test_fused_is_the_same_image_and_comes_undone_bit_for_bit(adapted):
    pipe = adapted.load()
    pipe.fuse_ether()
    adapted.assert_same(generate(pipe), adapted.image)
    pipe.unfuse_ether()
    pipe.disable_ether()
    adapted.assert_same(generate(pipe), adapted.plain)


def test_the_scale_of_a_call_is_the_strength_where_the_pipeline_passes_it_on(adapted):
    name = adapted.name
    pipe = adapted.load()
    for scale in (0.5, 0.0):
        scaled = generate(pipe, **{CALL.get(name, "attention_kwargs"): {"scale": scale}})
        adapted.assert_same(generate(pipe), adapted.image)  # the call leaves the strength as it was
        if adapted.component in SCALED[name] and scales_calls(pipe):
            pipe.set_adapters(["dog"], [scale])
        adapted.assert_same(scaled, generate(pipe))
        pipe.set_adapters(["dog"], [1.0])


@pytest.mark.parametrize("name", SCALED)
def test_one_file_holds_the_transformer_and_every_text_encoder(name, tmp_path):
    components = CARRYING[name]
    pipe = flow_zoo.make(name, tmp_path / "adapted")
    plain = generate(pipe)
    zoo.adapt_components(pipe, *components, method="ether_plus")
    image = generate(pipe)
    stock = flow_zoo.make(name, tmp_path / "stock")
    stock.load_ether_weights(pipe.save_ether_weights(tmp_path), "dog")
    assert stock.get_list_adapters() == dict.fromkeys(components, ["dog"])
    assert_same(generate(stock), image, np.abs(image - plain).max())
    stock.set_adapters("dog", dict.fromkeys(components, 0.0))
    assert_same(generate(stock), plain, np.abs(image - plain).max())


@pytest.mark.parametrize("name", SCALED)
def test_attention_of_these_transformers_is_left_as_it_is(name, tmp_path):
    pipe = flow_zoo.make(name, tmp_path)
    before = [type(module.processor) for module in pipe.transformer.modules() if hasattr(module, "processor")]
    message = f"{before[0].__name__}.*: leave it out, adapters work without it, and fuse_ether is the way"
    with pytest.raises(ValueError, match=message):
        enable_ether_attention(pipe.transformer)
    assert [type(m.processor) for m in pipe.transformer.modules() if hasattr(m, "processor")] == before


@pytest.mark.parametrize("name", SCALED)
def test_strengths_by_module_path_act_there_and_paths_without_an_adapter_are_refused(name, tmp_path):
    pipe = flow_zoo.make(name, tmp_path)
    zoo.adapt_components(pipe, "transformer", target_modules=["to_q"], name="dog")
    layers = dict(ether_layers(pipe.transformer))
    first = next(iter(layers)).split(".att")[0]
    pipe.set_adapters("dog", {"transformer": {first: 0.5}})
    scales = {path: layer.scaling["dog"] for path, layer in layers.items()}
    assert scales == {path: 0.5 if path.startswith(f"{first}.") else 1.0 for path in layers}
    for wrong in ("down", "mid", f"{first}0", "to_k"):
        told = f"dog: transformer has no layer {wrong} of this adapter; those there are .*to_q"
        with pytest.raises(ValueError, match=told):
            pipe.set_adapters("dog", {"transformer": {first: 0.1, wrong: 0.2}})
    assert {path: layer.scaling["dog"] for path, layer in layers.items()} == scales
