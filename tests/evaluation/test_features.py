"""The miniature's own features are extractors like any other."""

import numpy as np
import pytest
import torch
from helpers.scenes import images
from transformers import CLIPModel, CLIPTokenizer

from ether_diffusion import miniature
from ether_diffusion.evaluation.features import MiniatureFeatures, load_features
from ether_diffusion.metrics import frechet_distance, image_similarity, text_similarity


def test_the_miniature_is_an_extractor_like_any_other():
    shown, prompts = images(3), ["a red circle", "a toy", "a blue house"]
    model = CLIPModel.from_pretrained(miniature.FOLDER / "clip").eval()
    side = (model.config.vision_config.image_size,) * 2
    pixels = torch.stack([torch.from_numpy(np.array(each.resize(side))) for each in shown])
    values = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    tokenizer = CLIPTokenizer.from_pretrained(miniature.FOLDER / "tokenizer")
    ids = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        of_images = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
        texts = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    features = load_features("miniature", batch_size=2)
    wanted = torch.cosine_similarity(of_images[:2, None], of_images[None, 2:], dim=-1).mean().item()
    assert image_similarity(shown[:2], shown[2:], features) == pytest.approx(wanted, abs=1e-6)
    wanted = torch.cosine_similarity(of_images, texts).mean().item()
    assert text_similarity(shown, prompts, features) == pytest.approx(wanted, abs=1e-6)


def test_the_distance_of_a_set_to_itself_is_nothing_and_grows_with_noise():
    pytest.importorskip("torchmetrics")
    features = MiniatureFeatures()
    real = images(64)
    distances = [frechet_distance(images(64, noise), real, features=features) for noise in (0, 20, 60)]
    assert abs(distances[0]) < 1e-2 < distances[1] < distances[2]


def test_images_of_several_sizes_can_be_compared():
    pytest.importorskip("torchmetrics")
    shown = images(4)
    mixed = [image.resize((96, 96)) if k % 2 else image for k, image in enumerate(shown)]
    assert frechet_distance(mixed, shown, features=MiniatureFeatures()) >= -1e-3
