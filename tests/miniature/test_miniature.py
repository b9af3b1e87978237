"""The shipped weights: they load by stock calls, in one dtype, and generate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from evaluate_miniature import accuracy, labels_of, single_shape

from ether_diffusion import miniature
from ether_diffusion.files import checksum
from ether_diffusion.metrics import image_similarity
from ether_diffusion.miniature.world import draw_scene, held_out_pairs, subjects


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = miniature.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt: str, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=12, guidance_scale=5.0, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}])
def test_a_stock_call_loads_every_part_in_one_dtype(options):
    pipe = StableDiffusionPipeline.from_pretrained(miniature.FOLDER, **options)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {options.get("dtype", torch.float32)}
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel" and type(pipe.tokenizer).__name__ == "CLIPTokenizer"


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in miniature.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert not any(str(miniature.FOLDER.parents[2]) in p.read_text() for p in files if p.suffix == ".json")


def test_prompts_decide_the_background(pipe):
    image = generate(pipe, "a red circle on a blue background")
    corner = image[:8, :8].mean((0, 1))
    assert corner[2] > 0.55 and corner[2] > corner[0] + 0.3 and corner[2] > corner[1] + 0.3


def test_the_same_seed_generates_the_same_image(pipe):
    assert np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy"))
    assert not np.array_equal(generate(pipe, "a toy"), generate(pipe, "a toy", seed=1))


def test_the_clip_of_the_miniature_matches_images_with_their_captions():
    clip = miniature.ClipScore()
    scenes = [draw_scene("clip-test", k) for k in range(64)]
    images = clip.embed_images([s.render().image for s in scenes])
    texts = clip.embed_texts([s.caption for s in scenes])
    assert images.shape == texts.shape and torch.allclose(images.norm(dim=-1), torch.ones(64))
    found = (images @ texts.T).argmax(-1) == torch.arange(64)
    assert found.float().mean() > 0.6


def test_views_of_one_subject_are_more_alike_than_views_of_two():
    clip = miniature.ClipScore()
    shown = [[s.view(k).render().image for k in range(3)] for s in subjects()]
    same = np.mean([image_similarity(views[:1], views[1:], clip) for views in shown])
    other = np.mean([image_similarity(shown[k], shown[k - 1], clip) for k in range(len(shown))])
    assert same > other + 0.1


def test_the_recorded_quality_is_that_of_the_shipped_weights():
    report = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "miniature.json").read_text())
    assert report["weights_sha256"] == checksum(miniature.FOLDER)


def test_the_truth_of_the_classifier_is_the_scenes_own():
    scenes = [single_shape("t", k, held_out_pairs()) for k in range(20)]
    truth = labels_of(scenes)

    class Oracle:
        def name(self, images):
            return truth

    assert set(accuracy(Oracle(), [s.render().image for s in scenes], scenes).values()) == {1.0}
    assert all(scene.things[0].name in scene.caption for scene in scenes)
