"""Similarities against known answers, with real networks small enough to be made here, and no download."""

import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from ether_diffusion import miniature
from ether_diffusion.evaluation.features import load_features
from ether_diffusion.metrics import (
    ClassTokenFeatures,
    ClipFeatures,
    Lpips,
    diversity,
    drift,
    image_similarity,
    text_similarity,
)

RED, GREEN, YELLOW, BLUE = "red", "#00ff00", "#ffff00", "blue"


class MeanColour(nn.Module):
    """The direction of an image's mean colour, and of a colour's name: pure colours are orthogonal."""

    def embed_images(self, images):
        colours = [np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)) for image in images]
        return nn.functional.normalize(torch.tensor(np.stack(colours)), dim=-1)

    def embed_texts(self, texts):
        return self.embed_images([plain(text) for text in texts])


def plain(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def noise(count, size=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def mean_difference(first, second):
    return (first - second).abs().mean((1, 2, 3))


def test_a_image_is_wholly_similar_to_itself_and_not_at_all_to_an_orthogonal_one():
    features = MeanColour()
    assert image_similarity([plain(RED)], [plain(RED)], features) == pytest.approx(1)
    assert image_similarity([plain(RED)], [plain(BLUE)], features) == pytest.approx(0)
    # Features turned by 45 degrees.
    assert image_similarity([plain(RED)], [plain(YELLOW)], features) == pytest.approx(0.5**0.5)


def test_the_similarity_to_references_is_the_mean_over_all_pairs():
    features = MeanColour()
    assert image_similarity([plain(RED), plain(GREEN)], [plain(RED)] * 3 + [plain(BLUE)], features) == 3 / 8


def test_each_image_is_compared_with_its_own_prompt():
    features = MeanColour()
    pictures = [plain(RED), plain(BLUE)]
    assert text_similarity(pictures, ["red", "blue"], features) == pytest.approx(1)
    assert text_similarity(pictures, ["blue", "red"], features) == pytest.approx(0)


def test_drift_is_nothing_where_nothing_changed_and_one_for_orthogonal_images():
    features = MeanColour()
    pictures = [plain(RED), plain(BLUE)]
    assert drift(pictures, pictures, features) == pytest.approx(0, abs=1e-6)
    assert drift(pictures, [plain(RED), plain(GREEN)], features) == pytest.approx(0.5)
    assert drift(pictures, pictures[::-1], features) == pytest.approx(1)


def test_diversity_is_the_mean_over_prompts_of_the_mean_over_pairs():
    black, white = plain("black"), plain("white")  # 2 apart in values from −1 to 1
    assert diversity([[white, white, white]], distance=mean_difference) == 0
    assert diversity([[black, white]], distance=mean_difference) == pytest.approx(2)
    groups = [[black, black, white], [white, white]]
    for batch_size in (1, 2, 32):
        found = diversity(groups, distance=mean_difference, batch_size=batch_size)
        assert found == pytest.approx((4 / 3 + 0) / 2)


def test_lpips_without_its_packages_says_what_to_install_before_it_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r"LPIPS: .*torchmetrics and torchvision: pip install \"ether-diffusion\[eval\]"
    ):
        diversity([noise(2)])
    with pytest.raises(ValueError, match="got the net 'resnet', needs one of alex, vgg, squeeze"):
        Lpips("resnet")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: image_similarity([], [plain(RED)], f), "got 0 images and 1 references"),
        (lambda f: image_similarity([plain(RED)], [], f), "got 1 images and 0 references"),
        (lambda f: text_similarity([], [], f), "got 0 images and 0 prompts"),
        (lambda f: text_similarity([plain(RED)], ["red", "blue"], f), "got 1 images and 2 prompts"),
        (lambda f: drift([plain(RED)], [], f), "got 1 images and 0 images of the base model"),
        (lambda f: diversity([]), "got no groups"),
        (lambda f: diversity([[plain(RED)]]), "group 0 has 1 images, needs two"),
        (lambda f: diversity([[plain(RED), plain(RED, (4, 8))]]), r"group 0 has images of \[\(4, 8\), \(8, 8\)\]"),
    ],
)
def test_sets_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(MeanColour())


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DINO, a DINOv2 and a CLIP as the Hub holds them, with random weights."""
    root = tmp_path_factory.mktemp("extractors")
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=32)).save_pretrained(root / "dino")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "dino")
    transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).save_pretrained(root / "dinov2")
    cut = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**cut).save_pretrained(root / "dinov2")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(miniature.FOLDER / "tokenizer")
    text = {
        **{name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "vocab_size": len(tokenizer),
        "intermediate_size": 32,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SMALL, "intermediate_size": 32}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    transformers.CLIPImageProcessorPil(**cut).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return root


@pytest.mark.parametrize(
    ("name", "kind", "width"),
    [("dino", ClassTokenFeatures, 16), ("dinov2", ClassTokenFeatures, 16), ("clip", ClipFeatures, 12)],
)
def test_a_model_is_loaded_by_its_folder_and_the_batch_size_changes_nothing(folders, name, kind, width):
    pictures = noise(5)
    whole = load_features(str(folders / name))
    assert type(whole) is kind
    found = whole.embed_images(pictures)
    assert found.shape == (5, width) and found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=-1), torch.ones(5))
    one_by_one = load_features(str(folders / name), batch_size=1).embed_images(pictures)
    assert torch.allclose(found, one_by_one, atol=1e-6)
    assert image_similarity(pictures[:1], pictures[:1], whole) == pytest.approx(1, abs=1e-6)
    assert drift(pictures, pictures, whole) == pytest.approx(0, abs=1e-6)


def test_the_feature_of_a_vision_transformer_is_its_class_token(folders):
    features, (picture,) = load_features(str(folders / "dino")), noise(1)
    pixels = torch.from_numpy(np.array(picture.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    with torch.no_grad():
        token = features.model(pixel_values=pixels[None].float() / 127.5 - 1).last_hidden_state[0, 0]
    assert torch.allclose(features.embed_images([picture])[0], token / token.norm(), atol=1e-4)


def test_clip_features_are_those_of_its_own_two_towers(folders):
    features, pictures, prompts = load_features(str(folders / "clip")), noise(3), ["a dog", "a red cat", "a toy"]
    values = features.processor(pictures, return_tensors="pt").pixel_values
    ids = features.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = features.model(pixel_values=values, **ids)
    assert torch.allclose(features.embed_images(pictures), output.image_embeds, atol=1e-5)
    assert torch.allclose(features.embed_texts(prompts), output.text_embeds, atol=1e-5)
