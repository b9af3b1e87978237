"""Pipelines opened with adapters on them, and pipelines with adapters merged."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.lora import generate_any, record_of, run_command
from helpers.pipelines import ONE_GREY_LEVEL, assert_unchanged, generate, open_pipeline, snapshot
from peft import LoraConfig
from safetensors.torch import load_file

from ether_diffusion import EtherConfig
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
from diffusers import DiffusionPipeline
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
