"""LoRA files of transformers with flow matching: what stock pipelines and ComfyUI make of them."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import comfy, flow_zoo
from helpers.flow_images import generate
from helpers.lora import CLIP, STRENGTHS, assert_exact, dense_deltas, lora_deltas, run_command, save_adapter
from helpers.pipelines import ONE_GREY_LEVEL
from peft import PeftModel
from safetensors.torch import load_file

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.components import models_of
from ether_diffusion.commands import export as export_command
from ether_diffusion.errors import EtherFileError
from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.merge import merge_adapters, open_adapted

FAMILIES = ("flux", "kontext", "klein", "flux2", "sd3", "qwen", "z_image", "chroma", "sana", "lumina2", "krea2")
ALL = {  # layers of the blocks, which both formats have names for
    "flux": r"transformer_blocks\.\d+\.(attn\..+|ff.+(proj|2)|norm1.*linear)",
    "klein": r".*(transformer_blocks\.\d+\.attn\..+|linear_(in|out))",
    "sd3": r"transformer_blocks\.\d+\.(attn2?\..+|ff.+(proj|2)|norm1\.linear)|.+\.0\.norm1_context\.linear",
    "qwen": r"transformer_blocks\.\d+\.(attn\..+|(img|txt)_.+(proj|2|1))",
    "z_image": r"\w+\.\d+\.(attention\.to_.+|feed_forward\.w.|adaLN_modulation\.0)",
    "lumina2": r"\w+\.\d+\.(attn\.to_.+|feed_forward\.linear_.|norm1\.linear)",
    "sana": r"transformer_blocks\.\d+\.attn[12]\.to_.+",
    "krea2": r".*\.(attn\.to_.+|ff\..+)",
}
ALL |= {"kontext": ALL["flux"], "flux2": ALL["klein"], "chroma": r"transformer_blocks\.\d+\.(attn\..+|ff.+(proj|2))"}
SINGLE = {name: r"|single_transformer_blocks\.\d+\.(attn\.to_.+|proj_.+)" for name in ("flux", "kontext", "chroma")}
TEXT = {name: {"text_encoder": CLIP} for name in ("flux", "kontext")}
TEXT |= {"sd3": {"text_encoder": CLIP, "text_encoder_2": CLIP}, "chroma": {"text_encoder": ["q", "wo"]}}
KOHYA = tuple(sorted({*comfy.NAMES} - {"krea2"}))
READ_FROM_KOHYA = ("flux", "kontext", "chroma", "klein", "flux2", "qwen", "z_image")


@dataclass
class Base:
    """A pipeline on disk with adapters, and the images without them and with."""

    name: str
    folder: Path
    plain: np.ndarray
    linear: list[str]  # paths of the transformer's Linear layers

    def open(self) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def layers(self, *, with_single: bool = True) -> str:
        """A pattern of the Linear layers among those of ALL: a config's pattern may hit nothing else."""
        pattern = ALL[self.name] + (SINGLE.get(self.name, "") if with_single else "")
        found = [path for path in self.linear if re.fullmatch(pattern, path)]
        assert len(found) >= 8
        return "|".join(map(re.escape, found))

    def adapters(self, tmp_path: Path, kind: str, targets: dict) -> list[Path]:
        """An ETHER adapter, an ETHER+ one on fewer layers, or both: of layers of several ranks."""
        made = []
        if kind in ("ether", "both"):
            blocks = 1 if self.name == "z_image" else 2  # a feed-forward of odd width
            made.append(save_adapter(tmp_path, self.folder, "dog", targets, 1, num_blocks=blocks))
        if kind in ("ether_plus", "both"):
            fewer = {"exclude_modules": r".*(to_v|\.2|fc1|wo)"}
            made.append(save_adapter(tmp_path, self.folder, "style", targets, 2, method="ether_plus", **fewer))
        return made


@pytest.fixture(scope="module")
def base(request, tmp_path_factory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    pipe = flow_zoo.make(request.param, folder)
    pipe.save_pretrained(folder / "base")
    linear = [path for path, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return Base(request.param, folder / "base", generate(pipe), linear)


def assert_same_image(image: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    """To a grey level, and to much less than what the adapters change."""
    effect = np.abs(expected - plain).max()
    assert effect > 1e-4
    assert np.abs(image - expected).max() <= min(ONE_GREY_LEVEL, 0.05 * effect)


on = partial(pytest.mark.parametrize, indirect=["base"])
FORMATS = [(name, "diffusers-lora") for name in FAMILIES] + [(name, "kohya") for name in READ_FROM_KOHYA]


@pytest.mark.parametrize("kind", [pytest.param("ether", marks=pytest.mark.slow), "ether_plus", "both"])
@on(("base", "to"), sorted(FORMATS))
def test_stock_load_lora_weights_generates_the_image_of_the_adapters(base, to, kind, tmp_path):
    # Of FLUX.1's kohya files diffusers reads single blocks at the full width alone.
    targets = {"transformer": base.layers(with_single=to != "kohya")}
    if to == "diffusers-lora" or base.name in ("flux", "kontext"):
        targets |= TEXT.get(base.name, {})
    adapters = base.adapters(tmp_path, kind, targets)
    strengths = STRENGTHS[: len(adapters)]
    pipe, _ = open_adapted(base.folder, adapters, strengths)
    pipe.set_progress_bar_config(disable=True)
    given = ["--base", base.folder, "--adapter", *adapters, "--scale", *strengths, "--output_dir", tmp_path / "out"]
    run_command(export_command, ["--to", to, *map(str, given)])
    stock = base.open()
    exact = dense_deltas(stock, adapters, strengths)
    stock.load_lora_weights(next((tmp_path / "out").iterdir()))
    assert_exact(stock, exact)
    assert_same_image(generate(stock), generate(pipe), base.plain)


@pytest.mark.parametrize("kind", ["ether", pytest.param("both", marks=pytest.mark.slow)])
@on("base", KOHYA)
def test_comfyui_adds_to_every_layer_what_the_adapters_change(base, kind, tmp_path):
    adapters = base.adapters(tmp_path, kind, {"transformer": base.layers()})
    strengths = STRENGTHS[: len(adapters)]
    pipe, _ = open_adapted(base.folder, adapters, strengths)
    report = export_lora(pipe, tmp_path / "out", to="kohya")
    stock = base.open()
    exact = dense_deltas(stock, adapters, strengths)
    found = comfy.deltas_of(base.name, stock.transformer, report.path)
    assert found.keys() >= exact.keys()
    for path, delta in found.items():
        assert (delta - exact.get(path, 0 * delta)).norm() <= 1e-6 * exact.get(path, delta).norm(), path


@on("base", KOHYA)
def test_the_report_tells_which_files_diffusers_would_pass_over(base, tmp_path):
    pipe = base.open()
    config = EtherConfig(init_weights=False, target_modules=base.layers(with_single=False))
    pipe.transformer.add_adapter(config, adapter_name="dog")
    report = export_lora(pipe, tmp_path, to="kohya")
    assert "dog: strength 1" in str(report)
    stock = base.open()
    stock.load_lora_weights(report.path)
    passed_over = not lora_deltas(stock)
    assert passed_over is (base.name not in READ_FROM_KOHYA)
    assert ("would pass over this file; export to diffusers-lora" in str(report)) is passed_over


@on("base", FAMILIES)
def test_peft_loads_the_transformer_and_every_text_encoder(base, tmp_path):
    encoders = [name for name in models_of(base.open()) if name.startswith("text_encoder")]
    targets = {"transformer": base.layers()} | dict.fromkeys(encoders, r".*\.(q_proj|q)")
    adapters = base.adapters(tmp_path, "ether_plus", targets)
    pipe, _ = open_adapted(base.folder, adapters)
    report = export_lora(pipe, tmp_path / "lora", to="peft-lora")
    stock = base.open()
    exact = dense_deltas(stock, adapters, [1.0])
    for component in targets:
        PeftModel.from_pretrained(getattr(stock, component), report.path / component)
    assert_exact(stock, exact)


@on("base", FAMILIES)
def test_merged_adapters_are_a_stock_pipeline(base, tmp_path):
    adapters = base.adapters(tmp_path, "ether_plus", {"transformer": base.layers()})
    pipe, _ = open_adapted(base.folder, adapters)
    pipe.set_progress_bar_config(disable=True)
    image = generate(pipe)
    merged = DiffusionPipeline.from_pretrained(merge_adapters(pipe, tmp_path / "merged"))
    merged.set_progress_bar_config(disable=True)
    assert_same_image(generate(merged), image, base.plain)


@on("base", sorted({*comfy.NAMES} - {"lumina2"}))
def test_comfyui_maps_diffusers_own_names_too(base, tmp_path):
    pipe = base.open()
    config = EtherConfig(init_weights=False, target_modules=base.layers())
    pipe.transformer.add_adapter(config, adapter_name="dog")
    tensors = load_file(export_lora(pipe, tmp_path, to="diffusers-lora").path)
    paths = {key.partition(".lora_")[0].removeprefix("transformer.") for key in tensors}
    endings = {key.partition(".lora_")[2] for key in tensors}
    assert endings == {"A.weight", "B.weight"} and all(key.startswith("transformer.") for key in tensors)
    assert {path for path in paths if comfy.own_name(base.name, path) is None} == set()


KNOWN = "kohya's names are known here for SD 1/2, SDXL, FLUX.1, Chroma, FLUX.2, SD3, Qwen-Image, Z-Image, Lumina2, not"
LEFT_OUT = "has no name in kohya's format for {} that programs map: leave it out of the adapter; "
BOTH, PEFT = "diffusers-lora and peft-lora hold it", "peft-lora holds it"
REFUSED = [
    ("sana", "transformer", "to_q", "kohya", f"{KNOWN} for a SanaTransformer2DModel; {BOTH}"),
    ("krea2", "transformer", "to_q", "kohya", f"{KNOWN} for a Krea2Transformer2DModel; {BOTH}"),
    ("krea2", "text_encoder", "q_proj", "kohya", f"{KNOWN} for a Krea2Transformer2DModel; {PEFT}"),
    ("flux", "transformer", "x_embedder", "kohya", f"x_embedder {LEFT_OUT.format('FLUX.1')}{BOTH}"),
    ("chroma", "text_encoder", "q", "kohya", f"SelfAttention.q {LEFT_OUT.format('Chroma')}{BOTH}"),
    ("klein", "text_encoder", "q_proj", "kohya", f"q_proj {LEFT_OUT.format('FLUX.2')}{PEFT}"),
    ("klein", "transformer", "norm_out.linear", "kohya", f"norm_out.linear {LEFT_OUT.format('FLUX.2')}{BOTH}"),
    ("sd3", "transformer", ".*1.norm1_context.linear", "kohya", f"context.linear {LEFT_OUT.format('SD3')}{BOTH}"),
    ("qwen", "text_encoder", "q_proj", "kohya", f"q_proj {LEFT_OUT.format('Qwen-Image')}{PEFT}"),
    ("z_image", "transformer", "cap_embedder.1", "kohya", f"cap_embedder.1 {LEFT_OUT.format('Z-Image')}{BOTH}"),
    ("lumina2", "text_encoder", "q_proj", "kohya", f"q_proj {LEFT_OUT.format('Lumina2')}{PEFT}"),
    ("flux", "text_encoder_2", "q", "diffusers-lora", "text_encoder_2: a LoRA file of diffusers' FluxPipeline holds "
     "transformer, text_encoder; peft-lora fits every component"),
    ("sd3", "text_encoder_3", "q", "diffusers-lora", "holds transformer, text_encoder, text_encoder_2; peft-lora"),
    *[
        (name, "text_encoder", "q_proj", "diffusers-lora", "holds transformer; peft-lora fits every component")
        for name in ("klein", "flux2", "qwen", "z_image", "sana", "lumina2", "krea2")
    ],
]  # fmt: skip


@on(("base", "component", "target", "to", "message"), sorted(REFUSED))
def test_what_a_format_cannot_hold_is_refused_with_the_format_that_can(base, component, target, to, message, tmp_path):
    pipe = base.open()
    config = EtherConfig(init_weights=False, target_modules=target if "*" in target else [target])
    getattr(pipe, component).add_adapter(config, adapter_name="dog")
    with pytest.raises(ValueError, match=re.escape(message)):
        export_lora(pipe, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert export_lora(pipe, tmp_path / "peft", to="peft-lora").ranks


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya"])
@on("base", ["flux", "chroma", "klein", "sd3"])
def test_fused_projections_are_refused(base, to, tmp_path):
    adapter = base.adapters(tmp_path, "ether", {"transformer": ["to_q", "to_v"]})[0]
    pipe = base.open()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(EtherFileError, match="fused with others into one projection here: call unfuse_qkv"):
        pipe.load_ether_weights(adapter)
    pipe.transformer.add_adapter(EtherConfig(target_modules=["to_qkv"], init_weights=False), adapter_name="dog")
    with pytest.raises(ValueError, match=r"attn\.to_qkv (is a projection that fuse_qkv_projections made|has no name)"):
        export_lora(pipe, tmp_path / "out", to=to)


@on(
    ("base", "component", "target", "name"),
    [
        ("sd3", "text_encoder", "q_proj", r"lora_te1_text_model_encoder_layers_\d_self_attn_q_proj"),
        ("sd3", "text_encoder_2", "fc1", r"lora_te2_text_model_encoder_layers_\d_mlp_fc1"),
        ("sd3", "text_encoder_3", "wo", r"lora_te3_encoder_block_\d_layer_1_DenseReluDense_wo"),
        ("kontext", "text_encoder_2", "q", r"lora_te3_encoder_block_\d_layer_0_SelfAttention_q"),
    ],
)
def test_text_encoders_have_the_prefixes_that_comfyui_maps(base, component, target, name, tmp_path):
    pipe = base.open()
    config = EtherConfig(init_weights=False, target_modules=[target])
    getattr(pipe, component).add_adapter(config, adapter_name="dog")
    tensors = load_file(export_lora(pipe, tmp_path, to="kohya").path)
    assert tensors and all(re.fullmatch(name, key.partition(".")[0]) for key in tensors)
