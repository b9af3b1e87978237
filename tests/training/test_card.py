"""The model card: what it says, and that its code works."""

import re
from pathlib import Path

import pytest
from helpers.pipelines import adapt
from huggingface_hub import ModelCard

from ether_diffusion import miniature
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.training.card import CardContent, figures_of, size_of, write_card
from ether_diffusion.training.entry import launch_command
from ether_diffusion.training.families import ModelSource
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.methods.configs import Method

PROMPT = "a photo of sks dog"
LOADING = "import ether_diffusion\n\npipe.load_ether_weights({where})"
NASTY = 'a `sks` "dog" | it\'s\n---\n```python {where} \\ # é 🐕 \x85'


def card(folder: Path, source: ModelSource, **changes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_NAME).write_bytes(bytes(2500))
    given = {
        "method": Method("ether_plus", "ETHER+", None, "2405.20271"),
        "tags": ["ether", "peft", "dreambooth"],
        "loading": LOADING,
        "weights": folder / WEIGHTS_NAME,
        "prompt": PROMPT,
        "prompts": [PROMPT],
        "figures": {"steps": "200"},
        "command": launch_command("/somewhere/train.py", ["--instance_prompt", PROMPT]),
    }
    return write_card(folder, CardContent(source=source, **(given | changes))).read_text("utf-8")


def code_of(card: str) -> str:
    return re.search(r"^(`{3,})python\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)[2]


def test_the_card_says_what_the_result_is_and_how_it_came_about(tmp_path):
    text = card(tmp_path / "toy", ModelSource("someone/model", revision="main"))
    header = ModelCard(text).data
    assert header.base_model == "someone/model" and header.instance_prompt == PROMPT
    assert header.tags == ["diffusers", "text-to-image", "ether", "peft", "dreambooth"]
    assert "# ETHER+: `a photo of sks dog`" in text and "https://arxiv.org/abs/2405.20271" in text
    assert f"`{WEIGHTS_NAME}`: 2.5 kB" in text and "| steps | 200 |" in text and "![samples](grid.png)" in text
    assert "accelerate launch train.py --instance_prompt 'a photo of sks dog'" in text
    assert "DiffusionPipeline.from_pretrained('someone/model', revision='main')" in text


def test_the_card_of_an_upload_loads_from_the_hub(tmp_path):
    source = ModelSource("someone/model")
    shown = "control = load_image({control})\npipe.load_ether_weights({where})"
    text = card(tmp_path / "toy", source, loading=shown, hub_id="me/dog")
    assert 'load_image(hf_hub_download("me/dog", "control.png"))' in text
    assert "from huggingface_hub import hf_hub_download" in text and str(tmp_path) not in text
    assert 'pipe.load_ether_weights("me/dog")' in card(tmp_path / "toy", source, hub_id="me/dog")


def test_the_card_of_another_method_says_nothing_of_ether(tmp_path):
    folder = tmp_path / "toy" / "unet"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(1500))
    (folder / "config.json").write_bytes(bytes(500))
    changes = {
        "method": Method("full", "full finetuning", None, None),
        "tags": ["dreambooth"],
        "loading": "pipe.load_lora_weights({where})",
    }
    text = card(tmp_path / "toy", ModelSource("someone/model"), weights=folder, prompts=(), **changes)
    assert "arxiv" not in text and "ether" not in text and "Samples" not in text and "`unet`: 1.5 kB" in text


def test_no_prompt_breaks_the_card(tmp_path):
    text = card(
        tmp_path / "toy",
        ModelSource("someone/model"),
        prompt=NASTY,
        prompts=[NASTY],
        figures={"steps": NASTY},
        command=launch_command("train.py", [NASTY]),
    )
    read = ModelCard(text, ignore_metadata_errors=False)
    assert read.data.instance_prompt == NASTY and read.data.library_name == "diffusers"
    assert code_of(text).splitlines()[-1] == f"image = pipe(prompt={NASTY!r}).images[0]"
    compile(code_of(text), "card", "exec")
    (row,) = (line for line in read.text.splitlines() if line.startswith("| steps"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert sum(line.startswith("#") for line in read.text.splitlines()) == 4  # headings: title, samples, use, training


def test_a_local_base_is_named_in_full_where_the_card_stays_and_by_its_last_part_in_an_upload(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    source = ModelSource(str(tmp_path / "models" / "base"))
    assert f'from_pretrained("{tmp_path}/models/base")' in card(tmp_path / "toy", source)
    uploaded = card(tmp_path / "toy", source, hub_id="me/dog")
    assert 'from_pretrained("base")' in uploaded and str(tmp_path) not in uploaded


@pytest.mark.parametrize("kind", ["adapter", "miniature", "pipeline"])
def test_the_code_on_the_card_generates(tiny_pipeline, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save_pretrained("out/toy" if kind == "pipeline" else "models/base")
    loading = {
        "adapter": LOADING,
        "miniature": "pipe.set_progress_bar_config(disable=True)",
        "pipeline": "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({where})",
    }[kind]
    source = ModelSource(str(miniature.FOLDER) if kind == "miniature" else "models/base")
    code = code_of(card(Path("out/toy"), source, loading=loading))
    if kind == "adapter":
        adapt(tiny_pipeline, num_blocks=2).save_ether_weights("out/toy")
    names = {}
    exec(code.replace(f"pipe({PROMPT!r})", f"pipe({PROMPT!r}, num_inference_steps=1)"), names)
    assert names["image"].width == (64 if kind == "miniature" else 16)


def test_the_size_of_several_weights_is_without_checkpoints_and_other_files(tmp_path):
    folder = tmp_path / "toy"
    for path in ("unet/a.safetensors", "text_encoder/b.safetensors"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(bytes(400))
    for path in ("grid.png", "checkpoint-5/vectors.safetensors", ".saving/c.safetensors"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(bytes(24))
    assert size_of(folder) == 800
    assert size_of(folder / "grid.png") == 24


def test_figures_are_those_of_the_run(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1500))
    result = TrainingResult(losses=[1.0] * 50 + [9.0] + [0.5] * 50, seconds=202.0, peak_memory=3_210_000_000)
    given = {"images": "5", "parameters": 12345, "weights": tmp_path / "weights"}
    figures = figures_of(result, learning_rates={"denoiser": 1e-3}, **given)
    assert figures == {
        "images": "5",
        "trained parameters": "12,345",
        "size of the weights": "1.5 kB",
        "learning rate": "0.001",
        "steps": "101",
        "mean loss, first 50 steps": "1.0000",
        "mean loss, last 50 steps": "0.5000",
        "time": "202 s",
        "time per step, mean": "2 s",
        "peak memory": "3.21 GB",
    }
    short = TrainingResult(losses=[1.0, 0.5], seconds=1.0, peak_memory=1)
    figures = figures_of(short, learning_rates={"denoiser": 1e-3, "text encoder": 5e-4}, **given)
    assert figures["mean loss, first 2 steps"] == figures["mean loss, last 2 steps"] == "0.7500"
    assert figures["learning rate"] == "denoiser 0.001, text encoder 0.0005"
