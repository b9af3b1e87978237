"""Fusing and unfusing: exact, wherever the originals wait, and right beside LoRA in any order."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers.pipelines import ONE_GREY_LEVEL, adapt, assert_unchanged, generate, open_pipeline, snapshot
from helpers.tiny import make_pipeline
from helpers.zoo import adapt_components
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from transformers import CLIPTextModel

from ether_diffusion import EtherLayer
from ether_diffusion.adapters.stacks import stacks

LORA = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def vectors(tiny_pipeline_folder) -> dict:
    return adapt(open_pipeline(tiny_pipeline_folder), "ether_plus").ether_state_dict()


@pytest.fixture(scope="module")
def lora(tiny_pipeline_folder, tmp_path_factory):
    pipe = open_pipeline(tiny_pipeline_folder)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(**LORA))
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


def layers(pipe) -> list[EtherLayer]:
    return [m for model in (pipe.unet, pipe.text_encoder) for m in model.modules() if isinstance(m, EtherLayer)]


def weights(pipe) -> list[tuple[str, torch.Tensor]]:
    named = pipe.unet.named_parameters()
    return [(name.replace(".base_layer", ""), weight.data) for name, weight in named if ".ether_" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["device", "cpu", "disk"])
def test_weights_come_back_bit_for_bit_from_wherever_they_waited(vectors, tiny_pipeline_folder, dtype, keep):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=dtype)
    before = snapshot(pipe)
    pipe.load_ether_weights(vectors, "a")
    pipe.load_ether_weights({key: tensor.flip(-1) for key, tensor in vectors.items()}, "b")
    for fused in (["a"], ["b"]):
        pipe.fuse_ether(adapter_names=fused, keep_original=keep)
    kept = [layer.original_weight for layer in layers(pipe)]
    assert all(isinstance(each, torch.Tensor) != (keep == "disk") for each in kept)
    changed = [not torch.equal(layer.weight, layer.unmerged_weight()) for layer in layers(pipe)]
    assert all(changed)
    pipe.unfuse_ether()
    pipe.unload_ether_weights()
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("keep", ["device", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("undo", ["unfuse_ether", "unload_ether_weights"])
def test_weights_keep_their_memory_format(tiny_pipeline_folder, keep, dtype, memory_format, undo):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=dtype)
    pipe.unet.to(memory_format=memory_format)
    adapt_components(pipe, "unet", target_modules=["conv1", "conv_shortcut", "proj_in", "conv_in", "to_q"])
    before = {path: weight.clone() for path, weight in weights(pipe)}
    pipe.fuse_ether(keep_original=keep)
    assert {path: weight.stride() for path, weight in weights(pipe)} == {k: w.stride() for k, w in before.items()}
    assert sum(not torch.equal(weight, before[path]) for path, weight in weights(pipe)) == len(layers(pipe)) > 5
    getattr(pipe, undo)()
    assert {path: weight.stride() for path, weight in weights(pipe)} == {k: w.stride() for k, w in before.items()}
    assert all(torch.equal(weight, before[path]) for path, weight in weights(pipe))


@pytest.mark.parametrize(
    ("component", "kind"), [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel), ("both", None)]
)
@pytest.mark.parametrize("beside", [None, "of another model", "broken"])
def test_originals_wait_on_disk_for_models_that_were_loaded_from_a_subfolder(
    vectors, tiny_pipeline_folder, tmp_path, component, kind, beside
):
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "base")
    if beside is not None:
        (folder / "a").mkdir()
        content = save({"conv_in.weight": torch.ones(3)}) if beside == "of another model" else b"broken"
        (folder / "a" / "model.safetensors").write_bytes(content)
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel} if kind is None else {component: kind}
    parts = {name: each.from_pretrained(folder, subfolder=name) for name, each in kinds.items()}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    before, base = snapshot(pipe), generate(pipe)
    pipe.load_ether_weights(vectors)
    image = generate(pipe)
    pipe.fuse_ether(keep_original="disk")
    assert abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL < abs(image - base).max()
    assert not any(isinstance(layer.original_weight, torch.Tensor) for layer in layers(pipe))
    pipe.unload_ether_weights()
    assert_unchanged(pipe, before)


def test_a_model_that_was_loaded_from_nowhere_reads_no_folder(vectors, tiny_pipeline, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tiny_pipeline.unet.config._name_or_path)  # where its weights lie, by chance
    pipe = make_pipeline(tiny_tokenizer)
    pipe.load_ether_weights(vectors)
    with pytest.raises(ValueError, match="no .safetensors file of the folder .* pass keep_original='cpu'"):
        pipe.fuse_ether(["unet"], keep_original="disk")


def test_weights_that_are_not_those_on_disk_are_not_fused_from_there(vectors, tiny_pipeline_folder):
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(vectors)
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(1)
    with pytest.raises(ValueError, match="mid_block.*holds this weight as it is now: pass keep_original='cpu'"):
        pipe.fuse_ether(keep_original="disk")
    assert not any(layer.merged for layer in layers(pipe))
    with pytest.raises(ValueError, match="keep_original='ram': there are device, cpu, disk"):
        pipe.fuse_ether(keep_original="ram")


def test_a_file_that_changed_while_fused_is_refused(vectors, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    pipe = open_pipeline(tmp_path)
    pipe.load_ether_weights(vectors)
    pipe.fuse_ether(keep_original="disk")
    fused = generate(pipe)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    content = file.read_bytes()
    file.rename(tmp_path / "aside")  # diffusers keeps files mapped: one that is written over changes the model
    data = 8 + int.from_bytes(content[:8], "little")  # after the header
    file.write_bytes(content[:data] + bytes(len(content) - data))
    with pytest.raises(ValueError, match="has changed since it was fused"):
        pipe.unfuse_ether()
    assert np.array_equal(generate(pipe), fused)
    file.unlink()
    with pytest.raises(ValueError, match="needed to unfuse, cannot be read"):
        pipe.unfuse_ether()
    (tmp_path / "aside").rename(file)
    pipe.unfuse_ether()
    assert not any(layer.merged for layer in layers(pipe))


def test_a_base_model_over_fused_weights_from_disk_generates_as_the_base(vectors, tiny_pipeline_folder):
    pipe = open_pipeline(tiny_pipeline_folder)
    base = generate(pipe)
    pipe.load_ether_weights(vectors)
    pipe.fuse_ether(keep_original="disk")
    pipe.disable_ether()
    assert np.array_equal(generate(pipe), base)


# Beside LoRA --------------------------------------------------------------------------------------------------


def both(folder, vectors, lora, *, ether_first: bool):
    pipe = open_pipeline(folder)
    steps = [lambda: pipe.load_ether_weights(vectors, "ether"), lambda: pipe.load_lora_weights(lora, "lora")]
    for step in steps if ether_first else steps[::-1]:
        step()
    pipe.set_adapters(["ether", "lora"], [1.0, 0.7])
    return pipe


def weights_of(pipe) -> dict:
    return {layer: layer.get_base_layer().weight.clone() for layer in layers(pipe)}


def test_the_order_of_loading_is_the_order_of_composition(vectors, lora, tiny_pipeline_folder):
    for ether_first in (True, False):
        pipe = both(tiny_pipeline_folder, vectors, lora, ether_first=ether_first)
        path, stack = next((p, s) for p, s in stacks(pipe.unet) if len(s) == 2)
        bottom, top = stack
        assert isinstance(bottom, EtherLayer) == ether_first and isinstance(top, EtherLayer) != ether_first
        ether, added = (bottom, top) if ether_first else (top, bottom)
        weight = ether.get_base_layer().weight
        delta = added.get_delta_weight("lora")  # at its strength
        if ether_first:
            expected = ether.adapted_weight(["ether"]) + delta
        else:
            with torch.no_grad():
                weight.add_(delta)
            expected = ether.adapted_weight(["ether"])
            with torch.no_grad():
                weight.sub_(delta)
        x = torch.randn(3, weight.shape[1])
        with torch.no_grad():
            answer = pipe.unet.get_submodule(path)(x)
            bias = 0 if ether.bias is None else ether.bias
        torch.testing.assert_close(answer, x @ expected.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ether_first", [True, False])
def test_fusing_both_in_the_order_of_loading_keeps_the_image_and_comes_undone(
    vectors, lora, tiny_pipeline_folder, ether_first
):
    pipe = both(tiny_pipeline_folder, vectors, lora, ether_first=ether_first)
    image, weights = generate(pipe), weights_of(pipe)
    calls = [
        (pipe.fuse_ether, pipe.unfuse_ether),
        (lambda: pipe.fuse_lora(adapter_names=["lora"]), pipe.unfuse_lora),
    ]
    (fuse_first, unfuse_first), (fuse_second, unfuse_second) = calls if ether_first else calls[::-1]
    with pytest.raises(ValueError, match="is not fused: fuse"):
        fuse_second()
    assert all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in weights.items())
    fuse_first()
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    fuse_second()
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    if ether_first:
        with pytest.raises(ValueError, match="LORA .lora. lies above ETHER and is fused: call unfuse_lora first"):
            unfuse_first()
    unfuse_second()  # diffusers' own unfuses every method's adapters
    if any(layer.merged for layer in layers(pipe)):
        unfuse_first()
    elif not ether_first:
        unfuse_first()
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    for layer, weight in weights.items():
        torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ether_first", [True, False])
def test_one_stock_fuse_of_everything_keeps_the_image(vectors, lora, tiny_pipeline_folder, ether_first):
    pipe = both(tiny_pipeline_folder, vectors, lora, ether_first=ether_first)
    image = generate(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert all(layer.merged for layer in layers(pipe))
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    pipe.unfuse_lora()
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL


def test_a_lora_below_fused_ether_is_neither_fused_nor_silently_dropped(vectors, lora, tiny_pipeline_folder):
    pipe = open_pipeline(tiny_pipeline_folder)
    for name in ("lora", "second"):
        pipe.load_lora_weights(lora, name)
    pipe.fuse_lora(adapter_names=["lora"])
    pipe.load_ether_weights(vectors, "ether")
    pipe.fuse_ether()
    fused = weights_of(pipe)
    with pytest.raises(ValueError, match="LORA .lora, second. lies below ETHER .ether., which is fused: unfuse it"):
        pipe.fuse_lora(adapter_names=["second"])
    with pytest.raises(ValueError, match="has a fused ETHER adapter: call unfuse_ether before loading a LoRA"):
        pipe.load_lora_weights(lora, "third")
    assert all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in fused.items())


def test_a_lora_that_comes_to_life_below_fused_ether_is_an_error(vectors, lora, tiny_pipeline_folder):
    pipe = both(tiny_pipeline_folder, vectors, lora, ether_first=False)
    pipe.fuse_lora(adapter_names=["lora"])
    pipe.fuse_ether()
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A"):
            module.unmerge() if not isinstance(module, EtherLayer) else None
    with pytest.raises(ValueError, match="lora, loaded before the ETHER adapter that is fused, has become active"):
        generate(pipe)


def test_unloading_lora_leaves_fused_ether_fused_and_exact(vectors, lora, tiny_pipeline_folder):
    pipe = open_pipeline(tiny_pipeline_folder)
    before = snapshot(pipe)
    pipe.load_ether_weights(vectors, "ether")
    image = generate(pipe)
    pipe.load_lora_weights(lora, "lora")
    pipe.set_adapters("ether")
    pipe.fuse_ether()
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"unet": ["ether"], "text_encoder": ["ether"]}
    assert np.abs(generate(pipe) - image).max() <= ONE_GREY_LEVEL
    pipe.unload_ether_weights()
    assert_unchanged(pipe, before)


def test_pipelines_that_diffusers_loads_no_lora_onto_get_no_lora_methods(tiny_pipeline):
    from helpers.pipelines import TwinPipeline

    twins = TwinPipeline(tiny_pipeline.unet, tiny_pipeline.unet)
    assert not hasattr(twins, "fuse_lora") and not hasattr(twins, "unload_lora_weights")
    assert hasattr(tiny_pipeline, "fuse_lora") and hasattr(twins, "fuse_ether")


# Any order ----------------------------------------------------------------------------------------------------

CALLS = {
    "load a": lambda pipe, files: pipe.load_ether_weights(files / "a", "a"),
    "load b": lambda pipe, files: pipe.load_ether_weights(files / "b", "b"),
    "load lora": lambda pipe, files: pipe.load_lora_weights(files / "lora", "lora"),
    "all": lambda pipe, files: pipe.set_adapters(sorted(names_on(pipe)), 0.8),
    "a alone": lambda pipe, files: pipe.set_adapters("a"),
    "fuse": lambda pipe, files: pipe.fuse_ether(safe_fusing=True),
    "fuse on disk": lambda pipe, files: pipe.fuse_ether(components=["unet"], keep_original="disk"),
    "unfuse": lambda pipe, files: pipe.unfuse_ether(),
    "fuse lora": lambda pipe, files: pipe.fuse_lora(adapter_names=["lora"]),
    "fuse all": lambda pipe, files: pipe.fuse_lora(),
    "unfuse lora": lambda pipe, files: pipe.unfuse_lora(),
    "unload": lambda pipe, files: pipe.unload_ether_weights(),
    "unload lora": lambda pipe, files: pipe.unload_lora_weights(),
}
FUSES = {"fuse", "fuse on disk", "unfuse", "fuse lora", "fuse all", "unfuse lora"}


@pytest.fixture(scope="module")
def files(vectors, lora, tiny_pipeline_folder, tmp_path_factory):
    """Folders "a" and "b" with an ETHER adapter each, and "lora" with a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, held in {"a": vectors, "b": {key: tensor.flip(-1) for key, tensor in vectors.items()}}.items():
        pipe = open_pipeline(tiny_pipeline_folder)
        pipe.load_ether_weights(held)
        pipe.save_ether_weights(folder / name)
    shutil.copytree(lora, folder / "lora")
    return folder


def names_on(pipe) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}


def fused_layers(pipe) -> list[BaseTunerLayer]:
    models = (pipe.unet, pipe.text_encoder)
    return [m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer) and m.merged]


@torch.no_grad()
def answer(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    context = pipe.text_encoder(torch.arange(16)[None]).last_hidden_state
    return pipe.unet(torch.randn(1, 4, 8, 8, generator=generator), 500, context).sample


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.sampled_from(list(CALLS)), min_size=3, max_size=12))
def test_any_sequence_of_calls_computes_the_unfused_result_or_raises_and_ends_as_it_began(
    calls, files, tiny_pipeline_folder
):
    """Against a second pipeline that loads and unloads the same and never fuses."""
    pipe, unfused = open_pipeline(tiny_pipeline_folder), open_pipeline(tiny_pipeline_folder)
    before, lora_was_fused = snapshot(pipe), False
    for call in calls:
        fused = fused_layers(pipe)
        if fused and call in ("all", "a alone", "load a", "load b"):
            continue  # what is fused keeps acting, by definition
        if call == "unload lora" and any(not isinstance(layer, EtherLayer) for layer in fused):
            continue  # a fused LoRA stays in the weights, by definition
        if call == "fuse lora" and "lora" not in pipe.get_active_adapters():
            continue  # what is fused by name acts, active or not, by definition
        try:
            CALLS[call](pipe, files)
        except (ValueError, KeyError):
            continue
        lora_was_fused |= call in ("fuse lora", "fuse all")
        if call not in FUSES:
            CALLS[call](unfused, files)
        torch.testing.assert_close(answer(pipe), answer(unfused), rtol=1e-3, atol=1e-4)
    if lora_was_fused:
        pipe.unfuse_lora()
    if "lora" in names_on(pipe):
        pipe.unload_lora_weights()
    pipe.unload_ether_weights()
    if not any("lora" in call or call == "fuse all" for call in calls):  # which leave attributes of diffusers behind
        assert_unchanged(pipe, before)
    for name, (modules, _, weights) in snapshot(pipe).items():
        assert modules == before[name][0]
        for key, weight in weights.items():
            if lora_was_fused:
                torch.testing.assert_close(weight, before[name][2][key], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(weight, before[name][2][key])
