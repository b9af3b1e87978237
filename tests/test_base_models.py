"""Base models: names of the miniatures, and opening what was saved without a component."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from helpers.flow_zoo import sd3

from ether_diffusion.base_models import MINIATURES, absent_components, base_path, miniature_name, open_pipeline


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
