"""The pipeline's methods: what they generate, and what they leave behind."""

import copy
import gc
import subprocess
import sys
import weakref

import accelerate
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.pipelines import ONE_GREY_LEVEL, TwinPipeline, generate, open_pipeline
from peft import LoraConfig, get_peft_model

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.adapters.reading import read_adapter_file


def test_a_saved_adapter_generates_the_same_image_on_a_fresh_pipeline(trained, tiny_pipeline_folder, tmp_path):
    base = generate(open_pipeline(tiny_pipeline_folder))
    image = generate(trained)
    assert np.abs(image - base).max() > 10 * ONE_GREY_LEVEL
    trained.save_ether_weights(tmp_path)
    fresh = open_pipeline(tiny_pipeline_folder)
    fresh.load_ether_weights(tmp_path)
    assert np.abs(generate(fresh) - image).max() <= ONE_GREY_LEVEL


def test_a_saved_adapter_generates_the_same_image_in_a_new_process(trained, tiny_pipeline_folder, tmp_path):
    trained.save_ether_weights(tmp_path)
    np.save(tmp_path / "here.npy", generate(trained))
    code = f"""
import numpy as np, torch, ether_diffusion
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_pipeline_folder)!r})
pipe.load_ether_weights({str(tmp_path)!r})
image = pipe("a dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
print(np.abs(image - np.load({str(tmp_path / "here.npy")!r})).max())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) <= ONE_GREY_LEVEL


def test_a_fused_pipeline_generates_the_same_image_and_unfusing_restores_every_bit(trained):
    image = generate(trained)
    weights = {k: v.clone() for k, v in trained.unet.state_dict().items()}
    trained.fuse_ether(safe_fusing=True)
    assert any(not torch.equal(v, weights[k]) for k, v in trained.unet.state_dict().items())
    assert np.abs(generate(trained) - image).max() <= ONE_GREY_LEVEL
    trained.unfuse_ether()
    assert all(torch.equal(v, weights[k]) for k, v in trained.unet.state_dict().items())
    assert np.array_equal(generate(trained), image)


def test_fusing_at_a_scale_is_fusing_at_that_strength(trained):
    trained.set_adapters(["default"], [0.4])
    image = generate(trained)
    trained.set_adapters(["default"], [0.8])
    trained.fuse_ether(ether_scale=0.5)
    assert np.abs(generate(trained) - image).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("components", [["text_encoder"], ("text_encoder",), "text_encoder"])
def test_fusing_one_component_leaves_the_others(trained, components):
    image = generate(trained)
    trained.fuse_ether(components=components)
    assert not any(m.merged for m in trained.unet.modules() if isinstance(m, EtherLayer))
    assert all(m.merged for m in trained.text_encoder.modules() if isinstance(m, EtherLayer))
    assert np.abs(generate(trained) - image).max() <= ONE_GREY_LEVEL


def test_a_broken_adapter_is_not_fused_and_nothing_stays_fused(trained):
    last = [m for m in trained.text_encoder.modules() if isinstance(m, EtherLayer)][-1]
    with torch.no_grad():
        last.ether_u["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity in the merged weight"):
        trained.fuse_ether(safe_fusing=True)
    assert not any(m.merged for m in trained.unet.modules() if isinstance(m, EtherLayer))


def test_a_second_fuse_that_fails_leaves_the_first_as_it_was(trained):
    trained.load_ether_weights(trained.ether_state_dict(), "broken")
    last = [m for m in trained.text_encoder.modules() if isinstance(m, EtherLayer)][-1]
    with torch.no_grad():
        last.ether_u["broken"].fill_(float("nan"))
    trained.set_adapters(["default"], [0.8])
    trained.fuse_ether(ether_scale=0.5)
    weights = {k: v.clone() for k, v in trained.unet.state_dict().items()}
    with pytest.raises(ValueError, match="NaN or infinity in the merged weight"):
        trained.fuse_ether(adapter_names=["broken"], safe_fusing=True)
    assert all(torch.equal(v, weights[k]) for k, v in trained.unet.state_dict().items())
    assert {tuple(m.merged_adapters) for m in trained.unet.modules() if isinstance(m, EtherLayer)} == {("default",)}


@pytest.mark.parametrize("fused", [False, True])
def test_an_unloaded_pipeline_is_the_base_pipeline_again(trained, tiny_pipeline_folder, fused):
    fresh = open_pipeline(tiny_pipeline_folder)
    if fused:
        trained.fuse_ether()
    trained.unload_ether_weights()
    for name in ("unet", "text_encoder"):
        model, original = getattr(trained, name), getattr(fresh, name)
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
        assert model.state_dict().keys() == original.state_dict().keys()
        assert all(torch.equal(v, original.state_dict()[k]) for k, v in model.state_dict().items())
        assert model.__dict__.keys() == original.__dict__.keys()
    assert np.array_equal(generate(trained), generate(fresh))


def test_weights_of_set_adapters_are_strengths(trained, tiny_pipeline_folder):
    base, full = generate(open_pipeline(tiny_pipeline_folder)), generate(trained)
    trained.set_adapters(["default"], [0.0])
    assert np.array_equal(generate(trained), base)
    trained.set_adapters(["default"], [0.5])
    half = generate(trained)
    assert not np.array_equal(half, base) and not np.array_equal(half, full)
    trained.set_adapters(["default"], [1.0])
    assert np.array_equal(generate(trained), full)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_scale_of_one_call_leaves_the_strength_as_it_was(trained, scale):
    trained.set_adapters(["default"], [0.7])
    before = generate(trained)
    scaled = generate(trained, cross_attention_kwargs={"scale": scale})
    assert np.array_equal(scaled, before) == (scale == 1.0)
    assert np.array_equal(generate(trained), before)


def test_a_call_with_scale_zero_generates_with_the_base_model(trained, tiny_pipeline_folder):
    base = generate(open_pipeline(tiny_pipeline_folder))
    assert np.array_equal(generate(trained, cross_attention_kwargs={"scale": 0.0}), base)


def test_several_adapters_are_listed_combined_and_deleted(trained, tmp_path):
    alone = generate(trained)
    trained.load_ether_weights(trained.ether_state_dict(), "second")
    assert trained.get_active_adapters() == ["second"]
    assert trained.get_list_adapters() == {"unet": ["default", "second"], "text_encoder": ["default", "second"]}
    trained.set_adapters(["default", "second"], [1.0, 0.5])
    assert not np.array_equal(generate(trained), alone)
    with pytest.raises(ValueError, match="pass adapter_name, one of default, second"):
        trained.save_ether_weights(tmp_path)
    trained.save_ether_weights(tmp_path, "second")
    trained.delete_adapters("second")
    trained.set_adapters(["default"])
    assert np.array_equal(generate(trained), alone)


def test_default_names_are_the_next_free_ones(trained):
    vectors = trained.ether_state_dict()
    trained.load_ether_weights(vectors)
    trained.load_ether_weights(vectors)
    assert trained.get_list_adapters()["unet"] == ["default", "default_0", "default_1"]
    with pytest.raises(ValueError, match="'default_1' is already on"):
        trained.load_ether_weights(vectors, "default_1")


def test_a_folder_of_peft_loads_onto_the_component_it_fits(tiny_pipeline, tiny_pipeline_folder, tmp_path):
    model = get_peft_model(open_pipeline(tiny_pipeline_folder).unet, EtherConfig(init_weights=False))
    model.save_pretrained(tmp_path)
    tiny_pipeline.load_ether_weights(tmp_path)
    assert tiny_pipeline.get_list_adapters() == {"unet": ["default_0"]}
    with torch.no_grad():
        inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 16, 16))
        assert torch.allclose(tiny_pipeline.unet(*inputs).sample, model(*inputs).sample, atol=1e-5)


def test_pipelines_without_lora_methods_load_fuse_save_and_unload(tiny_pipeline, tmp_path):
    twins = TwinPipeline(tiny_pipeline.unet, copy.deepcopy(tiny_pipeline.unet))
    twins.unet_2.add_adapter(EtherConfig(init_weights=False), adapter_name="dog")
    twins.save_ether_weights(tmp_path)
    twins.unload_ether_weights()
    twins.load_ether_weights(tmp_path, "dog")
    assert not hasattr(twins.unet, "peft_config") and list(twins.unet_2.peft_config) == ["dog"]
    twins.fuse_ether()
    twins.unfuse_ether()
    twins.unload_ether_weights()
    assert all(torch.equal(v, twins.unet.state_dict()[k]) for k, v in twins.unet_2.state_dict().items())


def test_a_text_encoder_adapter_of_an_older_transformers_loads(trained, tiny_pipeline_folder):
    vectors = {k: v for k, v in trained.ether_state_dict().items() if k.startswith("text_encoder.")}
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in vectors)
    bare = {key.replace("text_encoder.text_model.", "text_encoder."): tensor for key, tensor in vectors.items()}
    first, second = open_pipeline(tiny_pipeline_folder), open_pipeline(tiny_pipeline_folder)
    first.load_ether_weights(vectors)
    second.load_ether_weights(bare)
    assert np.array_equal(generate(first), generate(second))


def test_another_base_model_is_a_warning(trained, tiny_pipeline_folder, tmp_path, caplog):
    trained.save_ether_weights(tmp_path)
    same = open_pipeline(tiny_pipeline_folder)
    same.load_ether_weights(tmp_path)
    assert not caplog.records
    half = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    half.load_ether_weights(tmp_path)
    assert not caplog.records
    other = open_pipeline(tiny_pipeline_folder)
    with torch.no_grad():
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(0.1)
    other.load_ether_weights(tmp_path)
    assert "trained on other base weights than those of unet" in caplog.text


def test_loading_draws_no_random_numbers_and_trains_nothing(trained, tiny_pipeline_folder):
    vectors = trained.ether_state_dict()
    fresh = open_pipeline(tiny_pipeline_folder)
    state = torch.get_rng_state()
    fresh.load_ether_weights(vectors)
    assert torch.equal(torch.get_rng_state(), state)
    layers = [m for m in fresh.unet.modules() if isinstance(m, EtherLayer)]
    assert not any(p.requires_grad for layer in layers for p in layer.ether_u.values())


def test_half_precision_keeps_the_vectors_in_float32(trained, tiny_pipeline_folder):
    half = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    half.load_ether_weights(trained.ether_state_dict())
    layers = [m for m in half.unet.modules() if isinstance(m, EtherLayer)]
    assert layers and all(p.dtype == torch.float32 for layer in layers for p in layer.ether_u.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_vectors_of_any_precision_load_as_float32(trained, tiny_pipeline_folder, low_cpu_mem_usage):
    fresh = open_pipeline(tiny_pipeline_folder)
    stored = {key: tensor.half() for key, tensor in trained.ether_state_dict().items()}
    fresh.load_ether_weights(stored, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded = fresh.ether_state_dict()
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in stored.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_an_offloaded_component_is_adapted_as_one_in_memory(trained, tiny_pipeline_folder, tmp_path):
    fresh, image = open_pipeline(tiny_pipeline_folder), generate(trained)
    accelerate.cpu_offload(fresh.unet, execution_device=torch.device("cpu"))
    assert fresh.unet.mid_block.attentions[0].proj_in.weight.device.type == "meta"
    fresh.load_ether_weights(trained.ether_state_dict())
    assert np.abs(generate(fresh) - image).max() <= ONE_GREY_LEVEL
    fresh.save_ether_weights(tmp_path)
    fresh.unload_ether_weights()
    assert not any(isinstance(m, EtherLayer) for m in fresh.unet.modules())


def test_a_compiled_component_is_adapted_below_its_wrapper(trained, tiny_pipeline_folder):
    fresh = open_pipeline(tiny_pipeline_folder)
    fresh.unet = torch.compile(fresh.unet, backend="eager")
    fresh.load_ether_weights(trained.ether_state_dict(), "dog")
    assert fresh.ether_state_dict("dog").keys() == trained.ether_state_dict().keys()
    fresh.unload_ether_weights()
    assert not any(isinstance(m, EtherLayer) for m in fresh.unet.modules())


def test_adapters_below_and_above_a_lora_are_unloaded_without_it(trained, tiny_pipeline_folder):
    vectors = trained.ether_state_dict()
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    trained.load_ether_weights(vectors, "second")
    trained.set_adapters(["default", "lora", "second"])
    generate(trained)
    trained.unload_ether_weights()
    assert not any(isinstance(m, EtherLayer) for m in trained.unet.modules())
    assert trained.get_list_adapters() == {"unet": ["lora"]}
    trained.unload_lora_weights()
    assert np.array_equal(generate(trained), generate(open_pipeline(tiny_pipeline_folder)))


def test_stock_lora_calls_work_beside_ether(trained, tmp_path):
    trained.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    trained.set_adapters(["default", "lora"], [1.0, 0.5])
    generate(trained)
    trained.set_lora_device(["default", "lora"], "cpu")
    trained.disable_lora()
    trained.enable_lora()
    trained.set_adapters("default")
    alone = generate(trained)
    trained.unload_lora_weights()
    assert trained.get_list_adapters() == {"unet": ["default"], "text_encoder": ["default"]}
    assert np.array_equal(generate(trained), alone)


def test_what_a_file_says_of_itself_is_there_when_it_is_saved_again(trained, tiny_pipeline_folder, tmp_path):
    trained.save_ether_weights(tmp_path / "first", metadata={"prompt": "a photo of sks dog"})
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(tmp_path / "first", "dog")
    path = pipe.save_ether_weights(tmp_path / "second")
    assert read_adapter_file(path).metadata["prompt"] == "a photo of sks dog"
    trained.save_ether_weights(tmp_path / "third", metadata={"prompt": "a cat"})
    pipe.load_ether_weights(tmp_path / "third", "dog", hotswap=True)
    path = pipe.save_ether_weights(tmp_path / "second", metadata={"seed": "1"})
    metadata = read_adapter_file(path).metadata
    assert (metadata["prompt"], metadata["seed"]) == ("a cat", "1")


def test_nothing_of_an_unloaded_adapter_stays_in_memory(trained):
    layers = [weakref.ref(m) for m in trained.unet.modules() if isinstance(m, EtherLayer)]
    vectors = [weakref.ref(layer().ether_u["default"]) for layer in layers]
    trained.fuse_ether()
    trained.unload_ether_weights()
    gc.collect()
    assert layers and not any(reference() is not None for reference in layers + vectors)


def test_a_component_that_is_offloaded_as_a_whole_takes_and_gives_back_an_adapter(trained, tiny_pipeline_folder):
    image, pipe = generate(trained), open_pipeline(tiny_pipeline_folder)
    base = generate(pipe)
    hooks = [accelerate.cpu_offload_with_hook(m, torch.device("cpu"))[1] for m in (pipe.text_encoder, pipe.unet)]
    pipe.load_ether_weights(trained.ether_state_dict())
    assert np.array_equal(generate(pipe), image)
    for hook in hooks:
        hook.offload()
    assert np.array_equal(generate(pipe), image)
    pipe.unload_ether_weights()
    assert np.array_equal(generate(pipe), base)


# Arguments of the stock loader, and what is no argument of it ----------------------------------------------------


@pytest.mark.parametrize("source", [["a", "b"], ("a",), {"a"}, None, 3, [{}]], ids=repr)
def test_several_sources_at_once_are_refused_in_a_sentence(tiny_pipeline, source):
    with pytest.raises(ValueError, match=f"got a {type(source).__name__}, needs one file.* call it once for each"):
        tiny_pipeline.load_ether_weights(source)


@pytest.mark.parametrize("argument", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_the_stock_argument_of_loading_is_taken(trained, tiny_pipeline_folder, tmp_path, argument):
    file = trained.save_ether_weights(tmp_path, safe_serialization=True, is_main_process=True)
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(file, **argument)
    assert np.array_equal(generate(pipe), generate(trained))


def test_pickles_are_neither_read_nor_written(trained, tmp_path):
    file = trained.save_ether_weights(tmp_path / "dog")
    with pytest.raises(ValueError, match="use_safetensors=False: adapters are read from .safetensors files alone"):
        trained.load_ether_weights(file, "dog", use_safetensors=False)
    with pytest.raises(ValueError, match="safe_serialization=False: adapters are written as .safetensors files"):
        trained.save_ether_weights(tmp_path / "cat", safe_serialization=False)
    assert not (tmp_path / "cat").exists() and list(trained.ether_adapters) == ["default"]


def test_only_the_main_process_writes(trained, tmp_path):
    path = trained.save_ether_weights(tmp_path / "dog", is_main_process=False, push_to_hub=True)
    assert not path.parent.exists()
    assert trained.save_ether_weights(tmp_path / "dog") == path and path.is_file()


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_dict_is_a_copy(trained, fused):
    if fused:
        trained.fuse_ether()
    image, vectors = generate(trained), trained.ether_state_dict()
    kept = {name: tensor.clone() for name, tensor in vectors.items()}
    for tensor in vectors.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert np.array_equal(generate(trained), image)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained.ether_state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [{}, {"autocast_adapter_dtype": True}, {"autocast_adapter_dtype": False}])
def test_vectors_are_loaded_in_float32_or_in_the_dtype_of_the_base(
    trained, tiny_pipeline_folder, tmp_path, dtype, autocast
):
    file, vectors = trained.save_ether_weights(tmp_path / "one"), trained.ether_state_dict()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=dtype)
    pipe.load_ether_weights(file, "dog", **autocast)
    expected = dtype if not autocast.get("autocast_adapter_dtype", True) or dtype == torch.float64 else torch.float32
    loaded = pipe.ether_state_dict()
    assert {vector.dtype for vector in loaded.values()} == {expected}
    assert all(torch.equal(loaded[name], vector.to(expected)) for name, vector in vectors.items())
    pipe.load_ether_weights({name: vector.flip(-1) for name, vector in vectors.items()}, "dog", hotswap=True)
    assert {vector.dtype for vector in pipe.ether_state_dict().values()} == {expected}
    again = open_pipeline(tiny_pipeline_folder)
    again.load_ether_weights(pipe.save_ether_weights(tmp_path / "two"), "dog")
    assert {vector.dtype for vector in again.ether_state_dict().values()} == {torch.float32}
    for call in (pipe.fuse_ether, pipe.unfuse_ether, pipe.unload_ether_weights):
        call()
