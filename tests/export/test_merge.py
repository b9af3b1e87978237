"""Pipelines opened with adapters on them, and pipelines with adapters merged."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from helpers.lora import generate_any, record_of, run_command
from helpers.pipelines import ONE_GREY_LEVEL, assert_unchanged, generate, open_pipeline, snapshot
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import CLIPTextModel

from ether_diffusion import ControlEncoder, EtherConfig, EtherControlPipeline
from ether_diffusion.adapters.components import ether_layers, models_of
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.commands import merge as merge_command
from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.lora_files import WRITERS
from ether_diffusion.export.merge import merge_adapters, open_adapted


def test_a_merged_pipeline_is_stock_and_generates_the_image_of_the_adapters(family, tmp_path, capsys):
    run_command(merge_command, family.arguments("--output_dir", str(tmp_path / "merged")))
    assert "1_dog, 2_style merged" in capsys.readouterr().out
    merged, base = DiffusionPipeline.from_pretrained(tmp_path / "merged"), family.open()
    merged.set_progress_bar_config(disable=True)
    assert type(merged) is type(base)
    for name, model in models_of(base).items():
        assert models_of(merged)[name].state_dict().keys() == model.state_dict().keys()
    assert np.abs(generate_any(merged) - family.image).max() <= ONE_GREY_LEVEL


def test_a_merged_pipeline_opens_without_this_package(one, tiny_pipeline_folder, tmp_path):
    pipe, names = open_adapted(tiny_pipeline_folder, [one])
    pipe.set_progress_bar_config(disable=True)
    np.save(tmp_path / "here.npy", generate(pipe))
    arguments = ["--base", str(tiny_pipeline_folder), "--adapter", str(one), "--output_dir", str(tmp_path / "merged")]
    run_command(merge_command, arguments)
    code = f"""
import sys, numpy as np, torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "merged")!r})
image = pipe("a dog", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
assert "ether_diffusion" not in sys.modules and "peft" not in str(type(pipe.unet.conv_in))
print(np.abs(image - np.load({str(tmp_path / "here.npy")!r})).max())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(result.stdout.split()[-1]) <= ONE_GREY_LEVEL


def test_an_adapter_of_another_base_is_refused_unless_it_is_asked_for(one, tiny_pipeline_folder, tmp_path):
    other = open_pipeline(tiny_pipeline_folder)
    with torch.no_grad():
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on other weights than those of unet in .*allow_other_base"):
        open_adapted(tmp_path / "other", [one])
    pipe, names = open_adapted(tmp_path / "other", [one], allow_other_base=True)
    report = export_lora(pipe, tmp_path, to="kohya", adapter_names=names)
    recorded = record_of(report.path)["base_fingerprint"]
    trained = read_adapter_file(one / WEIGHTS_NAME).metadata["base_fingerprint"]
    assert recorded["text_encoder"] == trained["text_encoder"] and recorded["unet"] != trained["unet"]


def test_an_adapter_that_does_not_say_its_base_is_used_with_a_warning(one, tiny_pipeline_folder, tmp_path, caplog):
    checkpoint = read_adapter_file(one / WEIGHTS_NAME)
    write_adapter_file(tmp_path / WEIGHTS_NAME, AdapterFile(checkpoint.configs, checkpoint.tensors))
    open_adapted(tiny_pipeline_folder, [one])
    assert not caplog.records
    open_adapted(tiny_pipeline_folder, [tmp_path])
    assert "does not say which weights it was trained on" in caplog.text


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("target", ["merge", *WRITERS])
def test_no_writer_writes_the_modules_of_another_methods_adapter(
    tiny_pipeline, tmp_path, component, ours_first, active, target
):
    """Exported and merged files hold module paths and weights as a stock model has them, or nothing is written."""
    other = LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)
    ours = EtherConfig(target_modules=["to_q", "q_proj"], init_weights=False)
    for config, name in [(ours, "dog"), (other, "style")][:: 1 if ours_first else -1]:
        for model in (tiny_pipeline.unet,) if name == "dog" else (getattr(tiny_pipeline, component),):
            model.add_adapter(copy.deepcopy(config), adapter_name=name)
    tiny_pipeline.set_adapters(["dog", "style"] if active else ["dog"])
    before = snapshot(tiny_pipeline)
    with pytest.raises(ValueError, match=rf"{component}: holds an adapter of another method .style.*delete it first"):
        if target == "merge":
            merge_adapters(tiny_pipeline, tmp_path / "out")
        else:
            export_lora(tiny_pipeline, tmp_path / "out", to=target)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert_unchanged(tiny_pipeline, before)
    tiny_pipeline.delete_adapters("style")
    if target == "merge":
        path = merge_adapters(tiny_pipeline, tmp_path / "out")
    else:
        path = export_lora(tiny_pipeline, tmp_path / "out", to=target).path
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    keys = [key for file in files for key in load_file(file)]
    assert keys and not any("base_layer" in key or ".style" in key for key in keys)


def test_a_name_by_itself_is_one_name_wherever_names_are_taken(tiny_pipeline, tmp_path):
    """`adapter_names="dog"` is not the adapters "d", "o" and "g"."""
    for name, seed in (("dog", 1), ("d", 2)):
        torch.manual_seed(seed)
        tiny_pipeline.unet.add_adapter(EtherConfig(target_modules=["to_q"], init_weights=False), adapter_name=name)
    tiny_pipeline.set_adapters("dog")
    files = [
        export_lora(tiny_pipeline, tmp_path / str(i), to="diffusers-lora", adapter_names=names).path
        for i, names in enumerate(["dog", ["dog"]])
    ]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for fuse, undo in [("fuse_ether", "unfuse_ether"), ("fuse_lora", "unfuse_lora")]:
        getattr(tiny_pipeline, fuse)(adapter_names="dog")
        merged = [layer.merged_adapters for _, layer in ether_layers(tiny_pipeline.unet)]
        assert merged and all(names == ["dog"] for names in merged)
        getattr(tiny_pipeline, undo)()
    merge_adapters(tiny_pipeline, tmp_path / "merged", adapter_names="dog")
    assert (tmp_path / "merged" / "model_index.json").is_file()


# A merge that raises ------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(one, tiny_pipeline):
    """The tiny pipeline with two adapters, one of them active."""
    for name in ("dog", "cat"):
        tiny_pipeline.load_ether_weights(one, name)
    tiny_pipeline.set_adapters("cat", 0.5)
    return tiny_pipeline


class Full(OSError):
    """No space left on the device."""


def fill_disk(monkeypatch, component: str) -> None:
    """Let the writing of one component end in an error of the disk."""

    def full(*args, **kwargs):
        raise Full(28, "No space left on device")

    kind = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}[component]
    monkeypatch.setattr(kind, "save_pretrained", full)


def assert_as_before(pipe, before: dict, image, folder) -> None:
    assert_unchanged(pipe, before)
    assert list(pipe.ether_adapters) == ["dog", "cat"] and pipe.get_active_adapters() == ["cat"]
    assert np.array_equal(generate(pipe), image)
    assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_a_merge_that_cannot_be_written_leaves_the_pipeline(adapted, tmp_path, monkeypatch, component, dtype, names):
    before, image = snapshot(adapted), generate(adapted)
    with monkeypatch.context() as patched:
        fill_disk(patched, component)
        with pytest.raises(Full):
            merge_adapters(adapted, tmp_path / "out", dtype=dtype, adapter_names=names)
    assert_as_before(adapted, before, image, tmp_path)
    merge_adapters(adapted, tmp_path / "out", adapter_names=names)
    assert not adapted.ether_adapters


@pytest.mark.parametrize("dtype", ["fp16", "int8", torch.int8, torch.float8_e4m3fn, torch.complex64, None, 16, []])
def test_a_merge_in_a_dtype_that_weights_cannot_have_is_refused_first(adapted, tmp_path, dtype):
    before, image = snapshot(adapted), generate(adapted)
    with pytest.raises(ValueError, match="dtype=.*: there are float32, float16, bfloat16, as names or"):
        merge_adapters(adapted, tmp_path / "out", dtype=dtype)
    assert_as_before(adapted, before, image, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dtype_by_its_name_is_that_dtype(adapted, tmp_path, dtype):
    merge_adapters(adapted, tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("verb", ["merge", *WRITERS])
@pytest.mark.parametrize("held", ["replaced modules", "a control encoder"])
def test_what_control_training_leaves_is_not_lost_in_a_merge_or_an_export(tiny_pipeline_folder, tmp_path, held, verb):
    pipe = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(0.1)
    pipe.unet.add_adapter(EtherConfig(target_modules=["to_q"], init_weights=False), adapter_name="dog")
    more = {"replaced_modules": {"unet": ["conv_in"]}} if held == "replaced modules" else {}
    file = pipe.save_ether_weights(tmp_path / "file", **more)
    pipe = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.load_ether_weights(file, "dog")
    if held == "a control encoder":
        pipe.add_control("dog", ControlEncoder.for_denoiser(pipe.unet, factor=pipe.vae_scale_factor))
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=f"dog: holds {held}.* which would be lost; only save_ether_weights"):
        if verb == "merge":
            merge_adapters(pipe, tmp_path / "out")
        else:
            export_lora(pipe, tmp_path / "out", to=verb)
    assert_unchanged(pipe, before)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "rest", [lambda p: p.disable_ether(), lambda p: p.set_adapters("cat", 0.0), lambda p: p.set_adapters([])]
)
@pytest.mark.parametrize("verb", ["merge", *WRITERS])
def test_adapters_that_do_not_act_are_neither_merged_nor_exported(adapted, tmp_path, rest, verb):
    rest(adapted)
    before = snapshot(adapted)
    with pytest.raises(ValueError, match="nothing to (merge|export): none of dog, cat acts: switch on"):
        if verb == "merge":
            merge_adapters(adapted, tmp_path / "out")
        else:
            export_lora(adapted, tmp_path / "out", to=verb)
    assert_unchanged(adapted, before)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("verb", ["merge", *WRITERS])
def test_a_pipeline_without_adapters_is_told_so(tiny_pipeline, tmp_path, verb):
    with pytest.raises(ValueError, match="nothing to (merge|export): this pipeline holds no ETHER adapter"):
        if verb == "merge":
            merge_adapters(tiny_pipeline, tmp_path / "out")
        else:
            export_lora(tiny_pipeline, tmp_path / "out", to=verb)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pipeline_that_was_made_in_inference_mode_is_merged(one, tiny_pipeline_folder, tmp_path, dtype):
    """Its weights cannot be written over outside of it."""
    expected = open_pipeline(tiny_pipeline_folder)
    expected.load_ether_weights(one)
    image = generate(expected)
    with torch.inference_mode():
        pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(one)
    merge_adapters(pipe, tmp_path / "out", dtype=dtype)
    assert np.abs(generate(pipe.to(torch.float32)) - image).max() <= 2 * ONE_GREY_LEVEL
    assert np.abs(generate(open_pipeline(tmp_path / "out").to(torch.float32)) - image).max() <= 2 * ONE_GREY_LEVEL
