"""Exports and merges: the files generate the same images in stock programs, and carry the names that those know."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from helpers.oracle import dense_weight
from helpers.pipelines import ONE_GREY_LEVEL, TwinPipeline, adapt, generate, open_pipeline
from helpers.tiny import make_pipeline
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from ether_diffusion import EtherConfig, EtherLayer
from ether_diffusion.adapters.components import models_of
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.commands import export as export_command
from ether_diffusion.commands import main as cli
from ether_diffusion.commands import merge as merge_command
from ether_diffusion.export.changes import alignment, relative_error, stacked_delta
from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.lora_files import Factors, finish, gather_parts, write_kohya
from ether_diffusion.export.merge import merge_adapters, open_adapted
from ether_diffusion.export.names import kohya_place, stability_path
from ether_diffusion.tuner.transforms import Adaptation, Vectors

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = [*ATTENTION, "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "conv_in", "0.conv", "linear_1"]
FLUX_DOUBLE = [*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2", "norm1.linear"]
FLUX_DOUBLE = [rf"transformer_blocks\.0\..*\b{re.escape(name)}" for name in FLUX_DOUBLE]
FLUX_SINGLE = [r"single_transformer_blocks\.0\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"]
STRENGTHS = [1.0, 0.7]


# Small pipelines of every family ----------------------------------------------------------------------------------


def small_vae(latents: int, **fields) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
        **fields,
    ).eval()


def make_sdxl(tokenizer) -> StableDiffusionXLPipeline:
    """SDXL's own blocks, with fewer and narrower layers in them."""
    torch.manual_seed(0)
    config = make_pipeline(tokenizer).text_encoder.config
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1, 2),
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=small_vae(4),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )


def make_flux(tokenizer, **fields) -> FluxPipeline:
    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in letters)]
    t5 = T5Config(
        vocab_size=len(vocabulary),
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    transformer = FluxTransformer2DModel(
        **(small | {"axes_dims_rope": (4, 4, 8)} | fields),
        patch_size=1,
        in_channels=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=small_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=make_pipeline(tokenizer).text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16),
        transformer=transformer.eval(),
    )


def targets_of(name: str, with_all: bool = True) -> dict[str, list[str] | str]:
    return {
        "sd": {"unet": UNET, "text_encoder": CLIP},
        "sdxl": {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP},
        "flux": {"transformer": "|".join(FLUX_DOUBLE + FLUX_SINGLE * with_all), "text_encoder": CLIP}
        | ({"text_encoder_2": ["q", "o", "wi_0", "wo"]} if with_all else {}),
    }[name]


def save_adapter(folder: Path, base: Path, name: str, targets: dict, seed: int, **fields) -> Path:
    """An adapter drawn at random on the target modules of every component, in a folder of that name."""
    torch.manual_seed(seed)
    pipe = DiffusionPipeline.from_pretrained(base)
    for component, modules in targets.items():
        config = EtherConfig(init_weights=False, target_modules=modules, **fields)
        getattr(pipe, component).add_adapter(config, adapter_name="default")
    pipe.save_ether_weights(folder / name)
    return folder / name


@dataclass
class Family:
    """A pipeline on disk with two adapters, and the image that they generate one on the other at STRENGTHS."""

    name: str
    base: Path
    adapters: list[Path]
    image: np.ndarray

    def open(self) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(self.base)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, *more: str) -> list[str]:
        strengths = map(str, STRENGTHS)
        return ["--base", str(self.base), "--adapter", *map(str, self.adapters), "--scale", *strengths, *more]


def generate_any(pipe: DiffusionPipeline) -> np.ndarray:
    flux = {"height": 16, "width": 16, "max_sequence_length": 16} if isinstance(pipe, FluxPipeline) else {}
    return generate(pipe, **flux)


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def family(request, tmp_path_factory, tiny_tokenizer) -> Family:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    make = {"sd": make_pipeline, "sdxl": make_sdxl, "flux": make_flux}[name]
    make(tiny_tokenizer).save_pretrained(folder / "base")
    # FLUX's fused layers are read back by diffusers at FLUX's own width only: single blocks have their own tests.
    targets = targets_of(name, with_all=False)
    adapters = [
        save_adapter(folder, folder / "base", "dog", targets, 1, num_blocks=2),
        save_adapter(
            folder, folder / "base", "style", targets, 2, method="ether_plus", exclude_modules=r".*to_v|.*fc1"
        ),
    ]
    pipe, _ = open_adapted(folder / "base", adapters, STRENGTHS)
    pipe.set_progress_bar_config(disable=True)
    return Family(name, folder / "base", adapters, generate_any(pipe))


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_pipeline_folder) -> Path:
    """An ETHER adapter of the tiny Stable Diffusion pipeline."""
    targets = {"unet": ATTENTION, "text_encoder": CLIP[:4]}
    return save_adapter(tmp_path_factory.mktemp("one"), tiny_pipeline_folder, "dog", targets, 1)


def run_command(command, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


def lora_deltas(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """What the LoRA that is loaded adds to every weight, by component and path."""
    return {
        f"{component}.{path.removeprefix('text_model.')}": layer.get_delta_weight(next(iter(layer.lora_A))).double()
        for component, model in models_of(pipe).items()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora_A
    }


def dense_deltas(pipe: DiffusionPipeline, adapters: list[Path], strengths=STRENGTHS) -> dict[str, torch.Tensor]:
    """The same by the dense definition of ETHER, from the weights of the base and the vectors in the files."""
    deltas = {}
    weights = {
        f"{component}.{key.replace('text_model.', '')}": weight.double()
        for component, model in models_of(pipe).items()
        for key, weight in model.state_dict().items()
    }
    for adapter, strength in zip(adapters, strengths, strict=True):
        vectors: dict[str, dict[str, torch.Tensor]] = {}
        for component, tensors in read_adapter_file(adapter / WEIGHTS_NAME).tensors.items():
            for key, tensor in tensors.items():
                path, _, vector = key.replace("text_model.", "").rpartition(".")
                vectors.setdefault(f"{component}.{path}", {})[vector.removeprefix("ether_")] = tensor
        for path, found in vectors.items():
            base = weights[f"{path}.weight"]
            before = deltas.get(path, torch.zeros_like(base))
            deltas[path] = dense_weight(base + before, **found, strength=strength) - base
    return deltas


def assert_exact(pipe: DiffusionPipeline, expected: dict[str, torch.Tensor], tolerance=1e-6) -> None:
    found = lora_deltas(pipe)
    assert found.keys() >= expected.keys()
    for path, delta in found.items():  # parts of a fused layer that have no adapter are there, with zeros
        exact = expected.get(path, torch.zeros_like(delta))
        assert (delta - exact).norm() <= tolerance * exact.norm(), path


# The same image everywhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
def test_stock_load_lora_weights_generates_the_image_of_the_adapters(family, to, tmp_path, capsys):
    run_command(export_command, family.arguments("--to", to, "--output_dir", str(tmp_path)))
    assert "max |û_a·û_b|" in capsys.readouterr().out
    pipe = family.open()
    assert np.abs(generate_any(pipe) - family.image).max() > 10 * ONE_GREY_LEVEL
    pipe.load_lora_weights(next(tmp_path.iterdir()))
    assert_exact(pipe, dense_deltas(family.open(), family.adapters))
    assert np.abs(generate_any(pipe) - family.image).max() <= ONE_GREY_LEVEL


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


def test_peft_loads_every_component_and_computes_what_ether_computes(family, tmp_path):
    pipe, names = open_adapted(family.base, family.adapters, STRENGTHS)
    report = export_lora(pipe, tmp_path / "lora", to="peft-lora", adapter_names=names)
    assert report.path == tmp_path / "lora"
    stock = family.open()
    for component in targets_of(family.name, with_all=False):
        PeftModel.from_pretrained(getattr(stock, component), tmp_path / "lora" / component)
    assert_exact(stock, dense_deltas(family.open(), family.adapters))


# The exact change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (12, 4), (6, 8, 3, 3), (4, 8, 1, 3)])
def test_a_stack_of_adapters_is_one_change_of_low_rank(shape):
    torch.manual_seed(0)
    o, i, kernel = shape[0], shape[1], int(np.prod(shape[2:]))
    weight = torch.randn(shape)
    stack = [
        Adaptation(Vectors(torch.randn(2, i // 2)), 0.3),
        Adaptation(Vectors(torch.randn(1, i), torch.randn(1, i)), 1.0),
        Adaptation(Vectors(*(torch.randn(2, width // 2) for width in (i, i, o, o))), 0.8),
    ]
    for adapters, rank in ((stack[:1], 2 * kernel), (stack[1:2], 2 * kernel), (stack, (2 + 2 + 4) * kernel + 4)):
        exact = weight.double()
        for vectors, strength in adapters:
            exact = dense_weight(exact, *vectors, strength)
        exactly = [Adaptation(vectors.map(torch.Tensor.double), strength) for vectors, strength in adapters]
        down, up = stacked_delta(weight, exactly)
        assert len(down) == up.shape[1] == min(rank, o, i * kernel)
        assert torch.allclose((up @ down).view(shape), exact - weight, atol=1e-12)


def test_a_change_near_the_start_of_ether_plus_is_as_exact_as_any():
    """There v̂ ≈ −û: the terms of the change are ten thousand times as large as the change."""
    torch.manual_seed(0)
    weight, u, u_out = torch.randn(32, 48), torch.randn(1, 48), torch.randn(1, 32)
    vectors = Vectors(u, -u + 1e-4 * torch.randn(1, 48), u_out, -u_out + 1e-4 * torch.randn(1, 32))
    factors = stacked_delta(weight, [Adaptation(vectors.map(torch.Tensor.double))])
    exact = dense_weight(weight, *vectors) - weight
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        down, up = (factor.to(dtype).double() for factor in factors)
        assert (up @ down - exact).norm() <= tolerance * exact.norm()


def test_the_error_of_a_change_that_vanishes_is_told_relative_to_the_weight():
    zero, weight = torch.zeros(3, 4), torch.ones(3, 4)
    assert relative_error(zero, zero, weight) == 0
    assert relative_error(zero + 1e-17, zero, weight) == pytest.approx(1e-5)
    assert relative_error(1.5 * weight, weight, weight) == pytest.approx(0.5)


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
    with pytest.raises(ValueError, match="nothing to export: of a, b, c none acts"):
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


# Limits that follow from the maths --------------------------------------------------------------------------------


def test_without_conflict_exported_adapters_add_up_to_their_composition_and_with_it_they_do_not():
    torch.manual_seed(0)
    weight, u = torch.randn(6, 8).double(), torch.randn(1, 8).double()
    other = torch.randn(1, 8).double()
    for v, expected in ((other - (other @ u.T) / (u @ u.T) * u, 0.0), (u + 0.1 * other, None), (-3 * u, 1.0)):
        found = alignment(Vectors(u), Vectors(v))
        changes = [stacked_delta(weight, [Adaptation(Vectors(x))]) for x in (u, v)]
        added = sum((up @ down for down, up in changes), start=weight)
        composed = dense_weight(dense_weight(weight, u), v)
        error = (added - composed).norm()
        assert expected is None or found == pytest.approx(expected, abs=1e-12)
        # W D_a D_b = 4 (û_a·û_b) W û_a û_bᵀ
        assert error.item() == pytest.approx(4 * found * (weight @ u.T / u.norm()).norm().item(), abs=1e-12)


def test_conflicts_look_at_every_direction_of_both_sides_and_at_any_blocks():
    e = torch.eye(4)
    plus = Vectors(e[:1], e[1:2], e[2:3], e[3:])
    assert alignment(plus, Vectors(e[2:3])) == 0
    assert alignment(plus, Vectors(e[1:2])) == 1
    assert alignment(Vectors(e[2:3]), Vectors(e[:1], u_out=e[2:3])) == 0
    assert alignment(plus, Vectors(e[3:], e[2:3], e[3:], e[:1])) == 1
    assert alignment(Vectors(torch.tensor([[3.0, 0.0], [0.0, 5.0]])), Vectors(e[3:])) == 1


def test_the_report_tells_the_conflict_of_adapters_and_what_strengths_do(one, tiny_pipeline_folder, tmp_path):
    pipe, names = open_adapted(tiny_pipeline_folder, [one, one])
    report = export_lora(pipe, tmp_path, to="kohya", adapter_names=names)
    assert names == ["1_dog", "2_dog"] and "conflict of 1_dog and 2_dog: max |û_a·û_b| = 1.00" in str(report)
    assert "ETHER keeps norms at strengths 0 and 1 alone, and at 0.5 erases û" in str(report)
    assert max(report.errors.values()) < 1e-3  # a reflection undoes itself: nothing is left to be wrong about


# The files --------------------------------------------------------------------------------------------------------


def record_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ether_export"])


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
    tiny_pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    tiny_pipeline.unet.add_adapter(EtherConfig(target_modules=["to_q"]), adapter_name="above")
    with pytest.raises(ValueError, match="an adapter of another method .* lies below ETHER"):
        export_lora(tiny_pipeline, tmp_path, to="kohya")


# Kohya's names ----------------------------------------------------------------------------------------------------

# sd-scripts names a layer `<prefix>.<module path>`, dots as underscores, in create_modules of networks/lora.py, with
# the prefixes LORA_PREFIX_* there; its U-Net has diffusers' paths for SD 1/2 and Stability's for SDXL
# (library/sdxl_original_unet.py). ComfyUI maps `lora_unet_<Stability's path>` and `lora_unet_<diffusers' path>`
# (comfy/lora.py, model_lora_keys_unet), and of text encoders the layers below (model_lora_keys_clip).
CLIP_NAME = r"text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
INNER = r"(proj_in|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_2))"
NAMES = {
    "sd": rf"lora_te_{CLIP_NAME}|lora_unet_((down_blocks_\d|mid_block|up_blocks_\d)_"
    rf"(attentions_\d_{INNER}|resnets_\d_(conv1|conv_shortcut|time_emb_proj)|(down|up)samplers_0_conv)"
    r"|conv_in|time_embedding_linear_1)",
    # Of SDXL's input blocks, 4, 5, 7 and 8 have attention, 3 and 6 are downsamplers; of its output blocks 0 to 5 have
    # attention, 2 and 5 an upsampler after it.
    "sdxl": rf"lora_te[12]_{CLIP_NAME}|lora_unet_((input_blocks_[4578]|middle_block|output_blocks_[0-5])_1_{INNER}"
    r"|(input_blocks_[124578]|middle_block|output_blocks_[0-8])_[02]_(in_layers_2|emb_layers_1|skip_connection)"
    r"|input_blocks_[36]_0_op|output_blocks_[25]_2_conv|input_blocks_0_0|time_embed_0|label_emb_0_0)",
    # networks/convert_flux_lora.py of sd-scripts lists the names of FLUX.1's layers.
    "flux": rf"lora_te1_{CLIP_NAME}|lora_unet_double_blocks_\d_(img|txt)_(attn_qkv|attn_proj|mlp_0|mlp_2)"
    r"|lora_te3_encoder_block_\d_layer_[01]_(SelfAttention_[qo]|DenseReluDense_(wi_0|wo))"
    r"|lora_unet_double_blocks_\d_img_mod_lin"
    r"|lora_unet_single_blocks_\d_(linear1|linear2|modulation_lin)",
}


def test_kohya_files_have_the_names_that_comfyui_and_sd_scripts_map(family, tmp_path):
    targets = targets_of(family.name)
    adapter = save_adapter(tmp_path, family.base, "all", targets, 3)
    pipe, names = open_adapted(family.base, [adapter])
    tensors = load_file(export_lora(pipe, tmp_path, to="kohya", adapter_names=names).path)
    layers = {key.partition(".")[0] for key in tensors}
    wrong = sorted(layer for layer in layers if not re.fullmatch(NAMES[family.name], layer))
    assert not wrong
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{layer}.{ending}" for layer in layers for ending in endings}
    for layer in layers:
        down, up = tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"]
        assert down.ndim == up.ndim and up.shape[1] == len(down) and set(up.shape[2:]) <= {1}
        assert tensors[f"{layer}.alpha"].dtype == torch.float32 and tensors[f"{layer}.alpha"].ndim == 0


def test_known_layers_of_the_full_models_have_their_known_names():
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            transformer_layers_per_block=(1, 2, 10),
        )
        sd = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=8)
    for unet, path, name in (
        (sdxl, "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
         "input_blocks.4.1.transformer_blocks.1.attn1.to_q"),
        (sdxl, "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
         "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0"),
        (sdxl, "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        (sdxl, "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        (sdxl, "up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        (sdxl, "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (sdxl, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        (sdxl, "up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        (sd, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (sd, "up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
        (sd, "conv_out", "out.2"),
        (sd, "conv_norm_out", None),
        (sd, "mid_block.attentions.0.transformer_blocks.0.norm1", None),
        (sd, "down_blocks.0.resnets.0.norm1", None),
    ):  # fmt: skip
        assert stability_path(unet, path) == name
        unet.get_submodule(path)


def flux_at_full_width() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def test_fused_layers_of_flux_are_read_back_part_by_part(tmp_path):
    torch.manual_seed(0)
    models = {"transformer": flux_at_full_width()}
    single = "single_transformer_blocks.0"
    ranks = {"attn.to_q": 1, "attn.to_v": 3, "proj_mlp": 2}
    parts, deltas = [], {}
    for name, rank in ranks.items():
        place = kohya_place(models, "transformer", f"{single}.{name}")
        layer = models["transformer"].get_submodule(f"{single}.{name}")
        factors = Factors(torch.randn(rank, 3072).double(), torch.randn(layer.out_features, rank).double())
        parts.append((("transformer", place.name), place, factors))
        deltas[name] = factors
    stored = finish(gather_parts(parts), {parts[0][0]: (3072,)}, rank=None, dtype=torch.float32, one_alpha=True)
    assert stored["transformer", "lora_unet_single_blocks_0_linear1"].up.shape == (21504, 12)
    write_kohya(tmp_path / "lora.safetensors", None, stored, {})
    read = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        down, up = (read[f"transformer.{single}.{name}.lora_{letter}.weight"] for letter in "AB")
        if name in deltas:
            x = torch.randn(3072, 2)
            assert torch.allclose(
                up @ (down @ x), (deltas[name].up @ (deltas[name].down @ x.double())).float(), atol=1e-2
            )
        else:
            assert not up.any()


@pytest.mark.slow
def test_a_single_block_of_flux_at_full_width_generates_the_same_image(tiny_tokenizer, tmp_path):
    """141 million weights: diffusers reads FLUX's fused layers back at this width only."""
    width = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    pipe = make_flux(tiny_tokenizer, num_layers=0, **width)
    pipe.set_progress_bar_config(disable=True)
    base = generate_any(pipe)
    for name, method in (("dog", "ether"), ("style", "ether_plus")):
        config = EtherConfig(method=method, init_weights=False, target_modules=FLUX_SINGLE[0])
        pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.set_adapters(["dog", "style"], STRENGTHS)
    image = generate_any(pipe)
    report = export_lora(pipe, tmp_path, to="kohya")
    assert max(report.errors.values()) <= 1e-6
    pipe.unload_ether_weights()
    pipe.load_lora_weights(report.path)
    # Few directions of 3,072 in one block of random weights move the image by less than a grey level.
    assert np.abs(generate_any(pipe) - image).max() <= 0.01 * np.abs(image - base).max()


# The command line -------------------------------------------------------------------------------------------------


def test_the_command_line_exports_and_merges(one, tiny_pipeline_folder, tmp_path, capsys):
    given = ["--base", str(tiny_pipeline_folder), "--adapter", str(one), "--output_dir", str(tmp_path / "out")]
    assert (
        cli.main(["export", "--to", "kohya", "--rank", "auto", "--scale", "0.5", "--dtype", "bfloat16", *given]) == 0
    )
    out = capsys.readouterr().out
    assert "kohya_lora.safetensors: kohya, bfloat16" in out and "largest relative error" in out
    assert "1_dog: strength 0.5" in out
    assert cli.main(["merge", *given]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert cli.main(["merge", *given[:-1], str(tmp_path / "whole"), "--dtype", "float16"]) == 0
    whole = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}


def test_the_command_line_says_what_is_wrong(one, tiny_pipeline_folder, wider_pipeline_folder, tmp_path, capsys):
    for changed, message in (
        (["--base", str(tmp_path / "nowhere")], "nowhere"),
        (["--adapter", str(tmp_path / "nothing")], "no such file or folder"),
        (["--base", str(wider_pipeline_folder)], "the adapter was made for another architecture"),
        (["--scale", "1", "0.5"], "1 adapters, but 2 strengths"),
        (["--weight_name", "../a.safetensors"], "is not the name of a .safetensors file"),
    ):
        given = {"--base": [str(tiny_pipeline_folder)], "--adapter": [str(one)], changed[0]: changed[1:]}
        words = [word for flag, values in given.items() for word in (flag, *values)]
        assert cli.main(["export", "--to", "kohya", "--output_dir", str(tmp_path / "out"), *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    with pytest.raises(SystemExit):
        cli.main(["export", "--rank", "many"])
    assert "got 'many', needs auto or a whole number" in capsys.readouterr().err
