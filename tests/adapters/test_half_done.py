"""A call that raises has changed nothing, and what cannot be done right is refused, whatever state tensors are in."""

import accelerate
import pytest
import torch
from helpers.pipelines import adapt, assert_unchanged, generate, open_pipeline, snapshot
from peft import LoraConfig

from ether_diffusion.tuner.layer import EtherLayer


@pytest.fixture
def vectors(tiny_pipeline_folder):
    pipe = adapt(open_pipeline(tiny_pipeline_folder), "ether_plus")
    return {name: tensor.clone() for name, tensor in pipe.ether_state_dict().items()}


def fused(pipe) -> int:
    models = (pipe.unet, pipe.text_encoder)
    return sum(layer.merged for model in models for layer in model.modules() if isinstance(layer, EtherLayer))


@pytest.mark.parametrize("target", ["proj_in", "conv_shortcut", "conv1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_weights_save_load_and_fuse(tiny_pipeline, tiny_pipeline_folder, tmp_path, target, dtype):
    adapt(tiny_pipeline, target_modules=[target, "q_proj"])
    file = tiny_pipeline.save_ether_weights(tmp_path)
    strided = open_pipeline(tiny_pipeline_folder).to(dtype)
    strided.unet.to(memory_format=torch.channels_last)
    strided.load_ether_weights(file, "dog")
    assert strided.ether_adapters["dog"].other_base == []
    strided.fuse_ether(keep_original="cpu")
    strided.unfuse_ether()
    strided.save_ether_weights(tmp_path / "again")
    strided.unload_ether_weights()


def test_an_adapter_loaded_in_inference_mode_is_exchanged_and_fused_outside_it(tiny_pipeline, vectors):
    with torch.inference_mode():
        tiny_pipeline.load_ether_weights(vectors, "dog")
        tiny_pipeline.fuse_ether()
    tiny_pipeline.unfuse_ether()
    tiny_pipeline.load_ether_weights({name: tensor.flip(-1) for name, tensor in vectors.items()}, "dog", hotswap=True)
    held = tiny_pipeline.ether_state_dict()
    assert all(torch.equal(held[name], tensor.flip(-1)) for name, tensor in vectors.items())


@pytest.fixture(scope="module")
def images(tiny_pipeline_folder):
    """Of the tiny pipeline and of it with the adapter of `vectors`."""
    pipe = open_pipeline(tiny_pipeline_folder)
    return generate(pipe), generate(adapt(pipe, "ether_plus"))


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize(
    ("fuse", "unfuse", "options"),
    [
        ("fuse_ether", "unfuse_ether", {}),
        ("fuse_ether", "unfuse_ether", {"keep_original": "cpu"}),
        ("fuse_ether", "unfuse_ether", {"keep_original": "disk"}),
        ("fuse_lora", "unfuse_lora", {}),
    ],
)
def test_a_pipeline_generates_whatever_was_done_to_it_in_inference_mode(
    tiny_pipeline_folder, vectors, images, made, fused, generated, fuse, unfuse, options
):
    """True: made, fused and unfused, or asked for images in inference mode."""
    base, adapted = images
    with torch.inference_mode(made):
        pipe = open_pipeline(tiny_pipeline_folder)
        pipe.load_ether_weights(vectors)
    with torch.inference_mode(fused):
        getattr(pipe, fuse)(**options)
    with torch.inference_mode(generated):
        assert abs(generate(pipe) - adapted).max() < 1e-3
        pipe.disable_ether()
        assert abs(generate(pipe) - base).max() < 1e-3
        pipe.enable_ether()
    with torch.inference_mode(fused):
        getattr(pipe, unfuse)()
    with torch.inference_mode(generated):
        assert (generate(pipe) == adapted).all()
        pipe.unload_ether_weights()
        assert (generate(pipe) == base).all()


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_modules_are_replaced_and_put_back_whatever_was_made_in_inference_mode(
    tiny_pipeline, tiny_pipeline_folder, tmp_path, images, made, loaded
):
    with torch.no_grad():
        tiny_pipeline.unet.conv_in.weight.add_(0.1)
    adapt(tiny_pipeline)
    tiny_pipeline.save_ether_weights(tmp_path, replaced_modules={"unet": ["conv_in"]})
    with torch.inference_mode(made):
        pipe = open_pipeline(tiny_pipeline_folder)
    with torch.inference_mode(loaded):
        pipe.load_ether_weights(tmp_path)
    assert (generate(pipe) == generate(tiny_pipeline)).all()
    with torch.inference_mode(loaded):
        pipe.unload_ether_weights()
    assert (generate(pipe) == images[0]).all()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("call", ["unfuse_ether", "unload_ether_weights", "unfuse_lora"])
def test_what_was_fused_and_then_offloaded_stays_as_it_is(tiny_pipeline, vectors, call, component):
    tiny_pipeline.load_ether_weights(vectors, "dog")
    tiny_pipeline.fuse_ether()
    count = fused(tiny_pipeline)
    accelerate.cpu_offload(getattr(tiny_pipeline, component), execution_device="cpu")
    with pytest.raises(ValueError, match="has been offloaded since"):
        getattr(tiny_pipeline, call)()
    assert fused(tiny_pipeline) == count and list(tiny_pipeline.ether_adapters) == ["dog"]


def test_one_projection_made_of_three_is_refused_before_and_after(tiny_pipeline, tiny_pipeline_folder, vectors):
    before = snapshot(tiny_pipeline)
    tiny_pipeline.load_ether_weights(vectors, "dog")
    image = generate(tiny_pipeline)
    with pytest.raises(ValueError, match="fuse_qkv_projections: dog would be lost"):
        tiny_pipeline.fuse_qkv_projections()
    assert (generate(tiny_pipeline) == image).all()
    tiny_pipeline.unload_ether_weights()
    assert_unchanged(tiny_pipeline, before)
    other = open_pipeline(tiny_pipeline_folder)
    other.fuse_qkv_projections()
    with pytest.raises(ValueError, match="to_q is fused with others .* call unfuse_qkv_projections first"):
        other.load_ether_weights(vectors)
    assert not other.ether_adapters
    other.unfuse_qkv_projections()
    other.load_ether_weights(vectors)
    assert (generate(other) == image).all()


@pytest.mark.parametrize("fuse", [False, True])
def test_a_pipeline_with_an_adapter_is_not_saved_as_a_folder_that_does_not_open(
    tiny_pipeline, vectors, tmp_path, fuse
):
    tiny_pipeline.load_ether_weights(vectors, "dog")
    if fuse:
        tiny_pipeline.fuse_ether()
    with pytest.raises(ValueError, match="save_pretrained: dog .*save_ether_weights .*merge_adapters"):
        tiny_pipeline.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    tiny_pipeline.unload_ether_weights()
    tiny_pipeline.save_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("ether_first", [True, False])
@pytest.mark.parametrize("components", [["unet"], ["text_encoder"], ["unet", "text_encoder"]])
def test_fuse_lora_merges_stacks_from_below_on_every_component(tiny_pipeline, vectors, ether_first, components):
    targets = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    own = {name: tensor for name, tensor in vectors.items() if name.partition(".")[0] in components}
    steps = [lambda: tiny_pipeline.load_ether_weights(own, "dog")]
    for component in components:
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets[component])
        steps.append(lambda c=component, k=config: getattr(tiny_pipeline, c).add_adapter(k, "lora"))
    for step in steps if ether_first else reversed(steps):
        step()
    tiny_pipeline.set_adapters(["dog", "lora"])
    image = generate(tiny_pipeline)
    tiny_pipeline.fuse_lora(components=components)
    assert abs(generate(tiny_pipeline) - image).max() < 1e-3
