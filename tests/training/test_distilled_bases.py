"""A distilled model is recognised, and the sentence on it names the base to train on."""

import json
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.errors import InputError
from ether_diffusion.training.families import ModelSource, family_at

FLUX, FLUX2, SD35 = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-klein-base",
    "stabilityai/stable-diffusion-3.5",
)
SANA = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
WIDTHS = {"4B": 3 * 2560, "9B": 3 * 4096}


def saved(folder: Path, pipeline: str, config: dict[str, Any], transformer: dict[str, Any]) -> ModelSource:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **config}))
    (folder / "transformer/config.json").write_text(json.dumps(transformer))
    return ModelSource(str(folder))


@pytest.mark.parametrize(
    "pipeline, name, config, transformer, base",
    [
        ("FluxPipeline", "any", {}, {"guidance_embeds": False}, FLUX),
        ("FluxPipeline", "any", {}, {}, FLUX),
        ("Flux2KleinPipeline", "any", {"is_distilled": True}, {"joint_attention_dim": WIDTHS["4B"]}, f"{FLUX2}-4B"),
        ("Flux2KleinPipeline", "any", {"is_distilled": True}, {"joint_attention_dim": WIDTHS["9B"]}, f"{FLUX2}-9B"),
        ("StableDiffusion3Pipeline", "stable-diffusion-3.5-large-turbo", {}, {}, f"{SD35}-large"),
        ("ZImagePipeline", "Z-Image-Turbo", {}, {}, "Tongyi-MAI/Z-Image"),
        ("Krea2Pipeline", "any", {"is_distilled": True}, {}, "krea/Krea-2-Raw"),
        ("SanaPipeline", "Sana_Sprint_1.6B_1024px_diffusers", {}, {}, SANA),
    ],
)
def test_a_distilled_model_is_told_by_its_config_or_name(tmp_path, pipeline, name, config, transformer, base):
    source = saved(tmp_path / name, pipeline, config, transformer)
    sentence = family_at(source).distilled(source)
    assert sentence.startswith(source.given) and sentence.endswith(f"; train on {base}")
    assert "\n" not in sentence and "distilled" in sentence


@pytest.mark.parametrize(
    "pipeline, name, config, transformer",
    [
        ("FluxPipeline", "FLUX.1-dev", {}, {"guidance_embeds": True}),
        ("FluxKontextPipeline", "FLUX.1-Kontext-dev", {}, {"guidance_embeds": True}),
        ("Flux2KleinPipeline", "FLUX.2-klein-base-4B", {"is_distilled": False}, {}),
        ("Flux2KleinPipeline", "FLUX.2-klein-base-9B", {}, {}),
        ("Flux2Pipeline", "FLUX.2-dev", {}, {}),
        ("StableDiffusion3Pipeline", "stable-diffusion-3.5-large", {}, {}),
        ("ZImagePipeline", "Z-Image", {}, {}),
        ("QwenImagePipeline", "Qwen-Image", {}, {}),
        ("Krea2Pipeline", "Krea-2-Raw", {"is_distilled": False}, {}),
        ("SanaPipeline", "Sana_1600M_1024px_BF16_diffusers", {}, {}),
    ],
)
def test_nothing_is_said_of_a_base(tmp_path, pipeline, name, config, transformer):
    source = saved(tmp_path / name, pipeline, config, transformer)
    assert family_at(source).distilled(source) is None


def test_a_pipeline_that_only_distilled_models_have_is_refused_with_the_same_sentence(tmp_path):
    source = saved(tmp_path / "any", "SanaSprintPipeline", {}, {})
    with pytest.raises(InputError, match=f"distilled .*; train on {SANA}$"):
        family_at(source)
