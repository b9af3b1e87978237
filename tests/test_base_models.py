"""Base models: names of the miniatures, and opening what was saved without a component."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from helpers.flow_zoo import sd3

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.base_models import (
    MINIATURES,
    absent_components,
    base_path,
    miniature_name,
    missing_locally,
    open_for_inference,
    open_pipeline,
)


def test_a_miniature_is_known_by_its_name_and_by_its_folder():
    for name, folder in MINIATURES.items():
        assert base_path(name) == str(folder)
        assert miniature_name(name) == miniature_name(folder) == miniature_name(f"{folder}/.") == name


@pytest.mark.parametrize("model", ["someone/model", "./miniature", "miniature-3"])
def test_other_models_are_taken_as_they_are(model):
    assert base_path(model) == model and miniature_name(model) is None


def test_what_was_saved_without_a_component_opens_again(tmp_path):
    pipe = sd3(tmp_path)
    parts = {**pipe.components, "text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="text_encoder_3"):
        DiffusionPipeline.from_pretrained(tmp_path / "base")
    opened = open_pipeline(tmp_path / "base")
    assert type(opened) is StableDiffusion3Pipeline and opened.text_encoder_3 is None
    assert opened.text_encoder is not None


def test_components_that_the_class_can_do_without_are_left_to_diffusers(tiny_pipeline_folder: Path):
    index = StableDiffusionPipeline.load_config(tiny_pipeline_folder)
    assert index["safety_checker"] == [None, None] and absent_components(index) == {}


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("miniatur", "two parts (owner/name), the miniatures are called miniature and miniature-dit"),
        ("./models/sd", "there is no such folder"),
        ("models/stable-difusion", "there is no such folder (did you mean models/stable-diffusion?)"),
        ("a/b/c", "there is no such folder"),
        ("someone/dog.safetensors", "there is no such file"),
    ],
)
def test_a_path_that_is_not_there_is_called_that_before_the_network_is_asked(place, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "stable-diffusion").mkdir(parents=True)
    assert told in missing_locally(place)
    with pytest.raises(FileNotFoundError) as refused:
        open_pipeline(place)
    assert f"{place}: " in str(refused.value) and told in str(refused.value)
    if "/" in place:
        with pytest.raises(FileNotFoundError, match="there is no such"):
            find_adapter_file(place)


@pytest.mark.parametrize("place", ["miniature", "someone/model", "models"])
def test_what_is_there_or_may_be_on_the_hub_is_not_called_missing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert missing_locally(place) is None


def test_float16_on_a_cpu_warns(caplog):
    open_for_inference("miniature", dtype="float16", device="cpu")
    assert "float16 on a CPU is many times slower" in caplog.text
