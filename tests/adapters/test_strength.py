"""Which adapters act, and how strongly: on every component of every kind of pipeline."""

import numpy as np
import pytest
import torch
from helpers.pipelines import ONE_GREY_LEVEL, assert_unchanged, generate, open_pipeline, snapshot
from helpers.zoo import adapt_components, ether_layers_of, flux, sdxl, strengths
from peft import LoraConfig
from PIL import Image

from ether_diffusion import EtherConfig, EtherLayer

IMAGE = Image.effect_noise((16, 16), 90).convert("RGB")


@pytest.fixture
def two(trained):
    """Two adapters, "default" and "second", on the denoiser and the text encoder."""
    trained.load_ether_weights({key: t.flip(-1) for key, t in trained.ether_state_dict().items()}, "second")
    return trained


# set_adapters -------------------------------------------------------------------------------------------------


def test_a_weight_is_a_number_or_one_for_each_adapter_or_one_for_each_component(two):
    two.set_adapters(["default", "second"], 0.5)
    assert strengths(two, "unet", "default") == strengths(two, "text_encoder", "second") == {0.5}
    two.set_adapters(["default", "second"], [0.25, None])
    assert strengths(two, "unet", "default") == {0.25} and strengths(two, "unet", "second") == {1.0}
    two.set_adapters("second", {"unet": 0.75})
    assert strengths(two, "unet", "second") == {0.75} and strengths(two, "text_encoder", "second") == {1.0}
    assert two.get_active_adapters() == ["second"]


def test_a_unet_takes_weights_by_block(two):
    two.set_adapters("default", {"unet": {"down": 0.2, "mid": 0.3, "up": {"block_1": 0.4}}})
    found = {}
    for name, module in two.unet.named_modules():
        if isinstance(module, EtherLayer):
            found.setdefault(name.split("_")[0], set()).add(module.scaling["default"])
    assert found == {"down": {0.2}, "mid": {0.3}, "up": {0.4}}


def test_layers_outside_the_blocks_stay_at_strength_one_beside_weights_by_block(tiny_pipeline):
    tiny_pipeline.unet.add_adapter(
        EtherConfig(target_modules=["conv_in", "conv_out", "time_embedding.linear_1", "to_q"]), adapter_name="default"
    )
    tiny_pipeline.set_adapters("default", {"unet": {"down": 0.2, "mid": 0.3}})
    layers = {n: m.scaling["default"] for n, m in tiny_pipeline.unet.named_modules() if isinstance(m, EtherLayer)}
    assert {layers[path] for path in ("conv_in", "conv_out", "time_embedding.linear_1")} == {1.0}
    assert {scale for path, scale in layers.items() if path.startswith("down_blocks")} == {0.2}
    assert {scale for path, scale in layers.items() if path.startswith("mid_block")} == {0.3}


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), True, "1"])
@pytest.mark.parametrize(
    "form",
    [
        lambda w: w,
        lambda w: [0.5, w],
        lambda w: {"text_encoder": w},
        lambda w: {"unet": {"up": {"block_1": w}}},
        lambda w: [0.5, {"unet": {"mid": w}}],
    ],
)
def test_no_strength_is_taken_that_is_no_finite_number(two, weight, form):
    two.set_adapters(["second"], 0.75)
    before = {(c, n): strengths(two, c, n) for c in ("unet", "text_encoder") for n in ("default", "second")}
    with pytest.raises(ValueError, match="needs a finite number"):
        two.set_adapters(["default", "second"], form(weight))
    assert before == {(c, n): strengths(two, c, n) for c, n in before} and two.get_active_adapters() == ["second"]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["default", "second", "default"], 1.0, "default is named more than once: an adapter acts once"),
        (["default", "third"], 1.0, "there is no adapter third; loaded are default, second"),
        (["default", "second"], [1.0], "2 adapters .default, second., but 1 weights"),
        ("default", {"unett": 1.0}, "unett is no component of this StableDiffusionPipeline; those that carry .*unet"),
        (["default", "second"], (0.5, 1.0), r"adapter_weights: got a tuple, needs .* a list: \[0.5, 1.0\]"),
        ("default", (0.5,), r"adapter_weights: got a tuple, needs .* a list: \[0.5\]"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(two, names, weights, message):
    two.set_adapters(["second"], [0.3])
    picture = generate(two)
    with pytest.raises(ValueError, match=message):
        two.set_adapters(names, weights)
    assert np.array_equal(generate(two), picture)


@pytest.mark.parametrize("component", ["vae", "control_encoder", "text_encoder", "safety_checker"])
@pytest.mark.parametrize("weight", [0.25, None, {"down": 0.5}])
def test_a_strength_for_a_component_that_nothing_adapts_is_ignored_with_a_warning(
    tiny_pipeline, caplog, component, weight
):
    tiny_pipeline.unet.add_adapter(EtherConfig(init_weights=False), adapter_name="default")
    tiny_pipeline.set_adapters(["default"], [{"unet": 0.75, component: weight}])
    assert strengths(tiny_pipeline, "unet", "default") == {0.75}
    assert f"no adapter is on {component}; the strength for it is ignored" in caplog.text
    caplog.clear()
    tiny_pipeline.set_adapters("default", {"unet": 0.5})
    assert not caplog.records


def test_a_pipeline_without_ether_is_left_to_diffusers(tiny_pipeline):
    tiny_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    tiny_pipeline.set_adapters("lora", {"unet": 0.5, "not a component": 1})  # diffusers warns, ours would raise
    assert tiny_pipeline.get_active_adapters() == ["lora"]
    assert tiny_pipeline.get_list_adapters() == {"unet": ["lora"]}
    tiny_pipeline.delete_adapters("lora")
    assert not any(tiny_pipeline.get_list_adapters().values())


@pytest.mark.parametrize("beside", [None, {"unet": 0.5}])
@pytest.mark.parametrize("component", ["vae", "control_encoder", "safety_checker"])
@pytest.mark.parametrize(
    "weight", [float("nan"), float("inf"), "1", True, {"down": float("nan")}, {"up": {"block_1": "a"}}]
)
def test_a_strength_that_is_none_is_refused_where_it_would_not_act_either(two, component, weight, beside):
    two.set_adapters(["second"], 0.75)
    with pytest.raises(ValueError, match=f"adapter_weights: default: got .* for {component}, needs a finite number"):
        two.set_adapters(["default", "second"], [{component: weight} | (beside or {}), 1.0])
    assert strengths(two, "unet", "second") == {0.75} and two.get_active_adapters() == ["second"]


def test_a_strength_that_is_none_is_refused_where_another_adapter_lies(tiny_pipeline):
    tiny_pipeline.unet.add_adapter(EtherConfig(init_weights=False), adapter_name="dog")
    tiny_pipeline.text_encoder.add_adapter(EtherConfig(init_weights=False), adapter_name="cat")
    with pytest.raises(ValueError, match="adapter_weights: dog: got nan for text_encoder"):
        tiny_pipeline.set_adapters(["dog", "cat"], [{"unet": 1.0, "text_encoder": float("nan")}, 0.5])
    assert strengths(tiny_pipeline, "text_encoder", "cat") == {1.0}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"doown": 0.5}, "unet has no blocks 'doown'; there are down, mid, up"),
        ({"down_blocks": 0.5}, "unet has no blocks 'down_blocks'"),
        ({"down.block_0": 0.5}, "unet has no blocks 'down.block_0'"),
        ({3: 0.5}, "unet has no blocks 3"),
        ({"down": {"block_9": 0.5}}, "unet has no attention in down: 'block_9'; those that have are block_0$"),
        ({"down": {"block_1": 0.5}}, "unet has no attention in down: 'block_1'"),
        ({"up": {"block_0": 0.5}}, "unet has no attention in up: 'block_0'; those that have are block_1$"),
        ({"mid": 0.5, "up": {"block_1": 0.5, "1": 0.5}}, "unet has no attention in up: '1'"),
        ({"mid": {"block_0": 0.5}}, "unet has no attention in mid: 'block_0'; .* give one number"),
        ({"down": {"block_0": [1.0, 1.0, 1.0]}}, "Expected 1 scales for down.block_0"),
    ],
)
def test_a_block_that_a_unet_does_not_have_is_told_before_anything_changes(two, weight, message):
    two.set_adapters(["second"], 0.75)
    with pytest.raises(ValueError, match=message):
        two.set_adapters(["second", "default"], [0.25, {"unet": weight}])
    assert strengths(two, "unet", "second") == {0.75} and two.get_active_adapters() == ["second"]


def test_strengths_by_path_are_for_layers_of_the_adapter_that_is_named(tiny_pipeline):
    pipe = flux(tiny_pipeline)
    parts = {"dog": r"transformer_blocks\..*to_q", "cat": r"single_transformer_blocks\..*to_q"}
    for name, target in parts.items():
        pipe.transformer.add_adapter(EtherConfig(target_modules=target, init_weights=False), adapter_name=name)
    pipe.text_encoder.add_adapter(EtherConfig(init_weights=False), adapter_name="bird")
    for component, paths, there in [
        ("transformer", {"single_transformer_blocks.0": 0.5}, "those there are transformer_blocks"),
        ("transformer", {"transformer_blocks.0": 0.5, "proj_out": 0.5}, "those there are transformer_blocks"),
        ("text_encoder", {"q_proj": 0.5}, "it has none there"),
    ]:
        with pytest.raises(ValueError, match=f"dog: {component} has no layer .* of this adapter; {there}"):
            pipe.set_adapters(["cat", "dog"], [0.25, {component: paths}])
        assert pipe.get_active_adapters() != ["cat", "dog"]
    pipe.set_adapters(["cat", "dog"], [{"transformer": {"single_transformer_blocks.0": 0.5}}, 0.75])
    scales = {name: {la.scaling[name] for la in ether_layers_of(pipe) if name in la.ether_u} for name in parts}
    assert scales == {"cat": {0.5}, "dog": {0.75}}


NO_NAMES = [5, 2.5, True, [3], ["default", None], [["default"]]]


@pytest.mark.parametrize("names", [*NO_NAMES, None])
@pytest.mark.parametrize("call", ["set_adapters", "delete_adapters", "set_ether_device"])
def test_what_is_no_name_is_told_in_a_sentence(two, call, names):
    more = ["cpu"] if call == "set_ether_device" else []
    with pytest.raises(ValueError, match="adapter_names=.*: a name fits, or a list of names"):
        getattr(two, call)(names, *more)
    assert two.get_list_adapters()["unet"] == ["default", "second"]


@pytest.mark.parametrize("names", NO_NAMES)
@pytest.mark.parametrize("argument", ["components", "adapter_names"])
@pytest.mark.parametrize("call", ["fuse_ether", "unfuse_ether", "fuse_lora", "unfuse_lora", "load_ether_weights"])
def test_what_is_no_name_is_not_fused_or_loaded(two, call, argument, names):
    if argument == "adapter_names" and not call.startswith("fuse"):
        argument = "components"  # the others take no adapters
    vectors = [two.ether_state_dict("default")] if call == "load_ether_weights" else []
    with pytest.raises(ValueError, match=f"{argument}=.*: a name fits, or a list of names"):
        getattr(two, call)(*vectors, **{argument: names})
    assert two.get_list_adapters()["unet"] == ["default", "second"]
    assert not any(layer.merged for layer in ether_layers_of(two))


@pytest.mark.parametrize("build", [lambda tiny: tiny, sdxl, flux])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5"])
def test_a_calls_scale_that_is_no_finite_number_spoils_no_later_call(build, tiny_pipeline, scale):
    pipe = build(tiny_pipeline)
    components = ["transformer"] if build is flux else ["unet", "text_encoder"]
    argument = "joint_attention_kwargs" if build is flux else "cross_attention_kwargs"
    adapt_components(pipe, *components, method="ether")
    pipe.set_adapters("default", 0.4)
    image = generate(pipe, height=16, width=16)
    with pytest.raises(ValueError, match="scale=.*: a finite number fits"):
        generate(pipe, height=16, width=16, **{argument: {"scale": scale}})
    assert {la.scaling["default"] for la in ether_layers_of(pipe)} == {0.4}
    assert np.array_equal(generate(pipe, height=16, width=16), image)
    for number in (np.float32(0.5), torch.tensor(0.5)):
        assert not np.array_equal(generate(pipe, height=16, width=16, **{argument: {"scale": number}}), image)


# Enabling, deleting, moving -----------------------------------------------------------------------------------


def test_disabled_ether_rests_beside_a_lora_that_acts(trained, tiny_pipeline_folder):
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    other = open_pipeline(tiny_pipeline_folder)
    for pipe in (other, trained):
        torch.manual_seed(5)
        pipe.unet.add_adapter(lora, "lora")
    trained.set_adapters(["default", "lora"], [0.7, 1.0])
    together = generate(trained)
    requires_grad = [p.requires_grad for p in trained.unet.parameters()]
    trained.disable_ether()
    assert np.abs(generate(trained) - generate(other)).max() <= ONE_GREY_LEVEL
    trained.enable_ether()
    assert np.array_equal(generate(trained), together)
    assert [p.requires_grad for p in trained.unet.parameters()] == requires_grad
    other.unload_lora_weights()
    with pytest.raises(ValueError, match="holds no ETHER adapter"):
        other.disable_ether()


def test_deleting_the_last_adapter_leaves_the_base_pipeline(two, tiny_pipeline_folder):
    fresh = snapshot(open_pipeline(tiny_pipeline_folder))
    with pytest.raises(ValueError, match="there is no adapter third"):
        two.delete_adapters(["default", "third"])
    two.delete_adapters("default")
    assert two.get_list_adapters() == {"unet": ["second"], "text_encoder": ["second"]}
    two.delete_adapters(["second"])
    assert_unchanged(two, fresh)


def test_a_fused_adapter_is_not_deleted(two):
    two.fuse_ether(adapter_names=["second"])
    with pytest.raises(ValueError, match="second is fused on .*: unfuse before deleting"):
        two.delete_adapters(["default", "second"])
    assert two.get_list_adapters()["unet"] == ["default", "second"]


def test_vectors_are_moved_by_the_name_of_their_adapter(two):
    two.set_ether_device("second", "meta")
    devices = {layer.ether_u[name].device.type for layer in ether_layers_of(two) for name in ("second",)}
    assert devices == {"meta"}
    assert {layer.ether_u["default"].device.type for layer in ether_layers_of(two)} == {"cpu"}
    with pytest.raises(ValueError, match="there is no adapter lora; loaded are default, second"):
        two.set_ether_device(["lora"], "cpu")
