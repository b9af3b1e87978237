"""LoRA files compute what the adapters compute, and say what they were made from."""

import numpy as np
import pytest
import torch
from helpers.lora import (
    STRENGTHS,
    assert_exact,
    dense_deltas,
    generate_any,
    lora_deltas,
    make_flux,
    record_of,
    run_command,
    targets_of,
)
from helpers.pipelines import ONE_GREY_LEVEL, TwinPipeline, adapt, generate, open_pipeline
from helpers.tiny import make_pipeline
from peft import PeftModel
from safetensors.torch import load_file

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.commands import export as export_command
from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.merge import merge_adapters, open_adapted


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
def test_stock_load_lora_weights_generates_the_image_of_the_adapters(family, to, tmp_path, capsys):
    run_command(export_command, family.arguments("--to", to, "--output_dir", str(tmp_path)))
    assert "max |û_a·û_b|" in capsys.readouterr().out
    pipe = family.open()
    assert np.abs(generate_any(pipe) - family.image).max() > 10 * ONE_GREY_LEVEL
    pipe.load_lora_weights(next(tmp_path.iterdir()))
    assert_exact(pipe, dense_deltas(family.open(), family.adapters))
    assert np.abs(generate_any(pipe) - family.image).max() <= ONE_GREY_LEVEL


def test_peft_loads_every_component_and_computes_what_ether_computes(family, tmp_path):
    pipe, names = open_adapted(family.base, family.adapters, STRENGTHS)
    report = export_lora(pipe, tmp_path / "lora", to="peft-lora", adapter_names=names)
    assert report.path == tmp_path / "lora"
    stock = family.open()
    for component in targets_of(family.name, with_all=False):
        PeftModel.from_pretrained(getattr(stock, component), tmp_path / "lora" / component)
    assert_exact(stock, dense_deltas(family.open(), family.adapters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
def test_the_report_tells_the_error_of_the_file(one, tiny_pipeline_folder, tmp_path, to, dtype):
    pipe, names = open_adapted(tiny_pipeline_folder, [one])
    report = export_lora(pipe, tmp_path, to=to, adapter_names=names, dtype=dtype)
    tensors = load_file(report.path)
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {dtype}
    assert report.size == report.path.stat().st_size
    assert set(report.ranks.values()) == {1}
    stock = open_pipeline(tiny_pipeline_folder)
    stock.load_lora_weights({key: tensor.float() for key, tensor in tensors.items()})
    exact = dense_deltas(open_pipeline(tiny_pipeline_folder), [one], [1.0])
    worst = max(
        ((found - exact[path]).norm() / exact[path].norm()).item() for path, found in lora_deltas(stock).items()
    )
    assert max(report.errors.values()) == pytest.approx(worst, rel=0.5)
    assert worst <= {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert f"change: {max(report.errors.values()):.1e}" in str(report)


def test_layers_of_many_ranks_fill_up_to_one_and_not_below_the_largest(family, tmp_path):
    pipe, names = open_adapted(family.base, family.adapters, STRENGTHS)
    auto = export_lora(pipe, tmp_path / "auto", to="diffusers-lora", adapter_names=names)
    assert len(set(auto.ranks.values())) > 1
    largest = max(auto.ranks.values())
    with pytest.raises(ValueError, match=f"rank {largest - 1} is too small: .* has the exact rank {largest}"):
        export_lora(pipe, tmp_path / "small", to="diffusers-lora", adapter_names=names, rank=largest - 1)
    for to in ("diffusers-lora", "kohya"):
        report = export_lora(pipe, tmp_path / to, to=to, adapter_names=names, rank=3 * largest + 1)
        assert set(report.ranks.values()) == {3 * largest + 1}
        stock = family.open()
        stock.load_lora_weights(report.path)
        assert_exact(stock, dense_deltas(family.open(), family.adapters))


def test_active_adapters_are_exported_at_their_strengths(tiny_pipeline, tmp_path):
    adapt(tiny_pipeline, "ether", name="a")
    adapt(tiny_pipeline, "ether", seed=2, name="b")
    adapt(tiny_pipeline, "ether", seed=3, name="c")
    tiny_pipeline.set_adapters(["c", "a"], [1.0, 0.5])
    report = export_lora(tiny_pipeline, tmp_path, to="diffusers-lora")
    assert report.strengths == {"c": [1.0], "a": [0.5]}
    assert "c: strength 1\na: strength 0.5" in str(report)
    tiny_pipeline.set_adapters(["c", "a"], [0.0, 0.0])
    with pytest.raises(ValueError, match="nothing to export: none of a, b, c acts: switch on"):
        export_lora(tiny_pipeline, tmp_path / "none", to="diffusers-lora")
    with pytest.raises(ValueError, match="there is no adapter d; loaded are a, b, c"):
        export_lora(tiny_pipeline, tmp_path / "none", to="diffusers-lora", adapter_names=["d"])


def test_the_weight_of_the_lora_is_the_strength_of_the_adapter(one, tiny_pipeline_folder, tmp_path):
    pipe, names = open_adapted(tiny_pipeline_folder, [one])
    report = export_lora(pipe, tmp_path, to="diffusers-lora", adapter_names=names)
    stock = open_pipeline(tiny_pipeline_folder)
    stock.load_lora_weights(report.path, adapter_name="dog")
    for strength in (0.0, 0.5, -0.3, 1.4):
        pipe.set_adapters(names, [strength])
        stock.set_adapters(["dog"], [strength])
        assert np.abs(generate(stock) - generate(pipe)).max() <= ONE_GREY_LEVEL


def test_the_report_tells_the_conflict_of_adapters_and_what_strengths_do(one, tiny_pipeline_folder, tmp_path):
    pipe, names = open_adapted(tiny_pipeline_folder, [one, one])
    report = export_lora(pipe, tmp_path, to="kohya", adapter_names=names)
    assert names == ["1_dog", "2_dog"] and "conflict of 1_dog and 2_dog: max |û_a·û_b| = 1.00" in str(report)
    assert "ETHER keeps norms at strengths 0 and 1 alone, and at 0.5 erases û" in str(report)
    assert max(report.errors.values()) < 1e-3  # a reflection undoes itself: nothing is left to be wrong about


@pytest.mark.parametrize("to", ["peft-lora", "diffusers-lora", "kohya"])
def test_files_record_the_base_the_adapters_and_the_release(one, tiny_pipeline_folder, tmp_path, to):
    pipe, names = open_adapted(tiny_pipeline_folder, [one], [0.8])
    report = export_lora(pipe, tmp_path / "out", to=to, adapter_names=names, dtype=torch.bfloat16)
    trained = read_adapter_file(one / WEIGHTS_NAME).metadata
    files = sorted(report.path.rglob("*.safetensors")) if to == "peft-lora" else [report.path]
    assert len(files) == (2 if to == "peft-lora" else 1)
    for file in files:
        record = record_of(file)
        assert record["base_fingerprint"] == trained["base_fingerprint"]
        assert record["base_model"] == trained["base_model"] == "tiny"
        assert record["adapters"] == [{"name": "1_dog", "strengths": [0.8]}]
        assert record["dtype"] == "bfloat16" and record["versions"]["ether-diffusion"]


def test_nothing_is_overwritten_and_a_failed_export_leaves_nothing(one, tiny_pipeline_folder, tmp_path):
    pipe, names = open_adapted(tiny_pipeline_folder, [one])
    with pytest.raises(ValueError, match="rank=0: a whole number"):
        export_lora(pipe, tmp_path / "new", to="kohya", rank=0)
    with torch.no_grad():
        next(m for m in pipe.unet.modules() if isinstance(m, EtherLayer)).ether_u["1_dog"].fill_(float("nan"))
    with pytest.raises(ValueError, match="does not fit into torch.float32"):
        export_lora(pipe, tmp_path / "new", to="kohya", adapter_names=names)
    with pytest.raises(ValueError, match="NaN or infinity in the merged weight"):
        merge_adapters(pipe, tmp_path / "merged", adapter_names=names)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "old.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        export_lora(pipe, tmp_path, to="kohya", adapter_names=names, weight_name="old.safetensors")
    assert (tmp_path / "old.safetensors").read_text() == "mine"


def test_an_adapter_of_the_text_encoders_mlp_alone_loads(tiny_pipeline, tiny_pipeline_folder, tmp_path):
    config = EtherConfig(init_weights=False, target_modules=["fc1"])
    tiny_pipeline.text_encoder.add_adapter(config, adapter_name="dog")
    for to in ("diffusers-lora", "kohya"):
        report = export_lora(tiny_pipeline, tmp_path, to=to)
        stock = open_pipeline(tiny_pipeline_folder)
        stock.load_lora_weights(report.path)
        assert np.abs(generate(stock) - generate(tiny_pipeline)).max() <= ONE_GREY_LEVEL


def test_what_a_format_cannot_hold_is_named(tiny_pipeline, tiny_tokenizer, tmp_path):
    twins = TwinPipeline(tiny_pipeline.unet, make_pipeline(tiny_tokenizer).unet)
    twins.unet_2.add_adapter(EtherConfig(init_weights=False), adapter_name="dog")
    with pytest.raises(ValueError, match="unet_2: a LoRA file of diffusers' TwinPipeline holds nothing"):
        export_lora(twins, tmp_path, to="diffusers-lora")
    with pytest.raises(ValueError, match=r"unet_2\.down_blocks\S+ has no name in kohya's format for SD 1/2"):
        export_lora(twins, tmp_path, to="kohya")
    assert set(export_lora(twins, tmp_path / "peft", to="peft-lora").errors)
    flux = make_flux(tiny_tokenizer)
    flux.transformer.add_adapter(EtherConfig(target_modules=["x_embedder"]), adapter_name="dog")
    with pytest.raises(ValueError, match=r"transformer\.x_embedder has no name in kohya's format for FLUX\.1"):
        export_lora(flux, tmp_path, to="kohya")
    flux.unload_ether_weights()
    flux.text_encoder_2.add_adapter(EtherConfig(target_modules=["q"]), adapter_name="dog")
    with pytest.raises(
        ValueError, match="text_encoder_2: a LoRA file of .* holds transformer, text_encoder; peft-lora"
    ):
        export_lora(flux, tmp_path, to="diffusers-lora")
