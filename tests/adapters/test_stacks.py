"""Stock calls of LoRA on pipelines that carry ETHER: all of what they do, or nothing."""

import pytest
import torch
from helpers.pipelines import adapt, assert_unchanged, open_pipeline, snapshot
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

TARGETS = {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"]}


@pytest.fixture(params=[True, False], ids=["ether below", "lora below"])
def both(request, tiny_pipeline):
    """ETHER and a LoRA on both components, in either order."""
    steps = [lambda: adapt(tiny_pipeline, "ether_plus", name="dog"), lambda: add_lora(tiny_pipeline)]
    for step in steps if request.param else reversed(steps):
        step()
    tiny_pipeline.set_adapters(["dog", "lora"], [1.0, 0.5])
    return tiny_pipeline


def add_lora(pipe) -> None:
    torch.manual_seed(2)
    for component, targets in TARGETS.items():
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
        getattr(pipe, component).add_adapter(config, "lora")


def state(pipe) -> list:
    layers = [m for c in TARGETS for m in getattr(pipe, c).modules() if isinstance(m, BaseTunerLayer)]
    return [(list(layer.merged_adapters), dict(layer.scaling)) for layer in layers]


def spoil(pipe, component: str, name: str) -> None:
    """Put NaN into the last vector, or LoRA factor, that an adapter has on a component."""
    parameters = [
        p for n, p in getattr(pipe, component).named_parameters() if n.endswith((f".{name}", f".{name}.weight"))
    ]
    parameters[-1].data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ["unet", "text_encoder", "prior"]}, "fuse_lora: prior is no component .* unet, text_encoder"),
        ({"components": ["unet", "vae"]}, "fuse_lora: vae is no component"),
        ({"components": "teacher"}, "fuse_lora: teacher is no component"),
        ({"adapter_names": ["dog", "cat"]}, "there is no adapter cat; loaded are"),
        ({"lora_scale": float("nan")}, "lora_scale=nan: a finite number fits"),
        ({"lora_scale": float("inf")}, "lora_scale=inf: a finite number fits"),
        ({"lora_scale": "0.5"}, "lora_scale='0.5': a finite number fits"),
    ],
)
def test_fuse_lora_checks_names_and_scale_before_the_first_component(both, options, message):
    before, layers = snapshot(both), state(both)
    with pytest.raises(ValueError, match=message):
        both.fuse_lora(**options)
    assert_unchanged(both, before)
    assert state(both) == layers


@pytest.mark.parametrize("component", list(TARGETS))
@pytest.mark.parametrize("name", ["dog", "lora"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fuse_lora_that_meets_a_broken_adapter_on_any_component_leaves_all_of_them(both, component, name, scale):
    assert_nothing_is_fused_of_a_broken(both, component, name, scale)


@pytest.mark.parametrize("both", [True], indirect=True)
@pytest.mark.parametrize("component", list(TARGETS))
def test_fuse_lora_that_raises_leaves_what_was_fused_before_it(both, component):
    both.fuse_ether(components=["unet"])
    assert_nothing_is_fused_of_a_broken(both, component, "lora", 0.5)


def assert_nothing_is_fused_of_a_broken(pipe, component: str, name: str, scale: float) -> None:
    spoil(pipe, component, name)
    before, layers = snapshot(pipe), state(pipe)
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(lora_scale=scale, safe_fusing=True)
    for part in TARGETS:
        now, weights = getattr(pipe, part).state_dict(), before[part][2]
        assert now.keys() == weights.keys() and set(vars(getattr(pipe, part))) == before[part][1]
        # NaN is not equal to itself
        assert all(torch.equal(now[key].nan_to_num(7), value.nan_to_num(7)) for key, value in weights.items())
    assert state(pipe) == layers


def test_fuse_lora_after_one_that_raised_gives_what_it_gives_at_once(both, tiny_pipeline_folder):
    held = [p for n, p in both.text_encoder.named_parameters() if n.endswith("lora_B.lora.weight")][-1]
    kept = held.detach().clone()
    held.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        both.fuse_lora(safe_fusing=True)
    held.data.copy_(kept)
    base = open_pipeline(tiny_pipeline_folder)
    both.fuse_lora(safe_fusing=True)
    both.unfuse_lora()
    both.unload_lora_weights()
    both.unload_ether_weights()
    for component in TARGETS:
        weights = getattr(base, component).state_dict()
        for key, value in getattr(both, component).state_dict().items():
            torch.testing.assert_close(value, weights[key])


@pytest.mark.parametrize("components", [["unet", "prior"], ["text_encoder", "vae"], "teacher"])
def test_unfuse_lora_checks_names_before_the_first_component(both, components):
    both.fuse_lora()
    before, layers = snapshot(both), state(both)
    with pytest.raises(ValueError, match="unfuse_lora: .* is no component that a LoRA can be on here"):
        both.unfuse_lora(components=components)
    assert_unchanged(both, before)
    assert state(both) == layers


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", None, True])
def test_ether_is_fused_at_no_scale_that_is_no_finite_number(trained, scale):
    before = snapshot(trained)
    with pytest.raises(ValueError, match="ether_scale=.*: a finite number fits"):
        trained.fuse_ether(ether_scale=scale)
    assert_unchanged(trained, before)
