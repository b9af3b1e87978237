"""The world: what it draws, how it says it, and what it keeps from the miniature's training."""

import random

import numpy as np
import pytest
from miniature_models import PROMPT_LENGTH, build_tokenizer, build_unet, build_vae
from PIL import Image

from ether_diffusion.miniature import world
from ether_diffusion.miniature.render import COLOURS, PATTERNS, SIZE, label_image
from ether_diffusion.miniature.scene import Figure, Scene, Shape
from ether_diffusion.miniature.shapes import FIGURES, LABELS, SHAPES

SCENES = [world.draw_scene("test", index) for index in range(1500)]


def test_the_world_is_as_rich_as_it_is_said_to_be():
    assert len(SHAPES) >= 8 and len(COLOURS) >= 10 and len(FIGURES) >= 3 and len(world.SIZES) >= 2
    assert len(world.subjects()) >= 8 and world.VIEWS >= 6
    drawn = {type(thing) for scene in SCENES for thing in scene.things}
    assert drawn == {Shape, Figure}
    assert {scene.pattern for scene in SCENES} == set(PATTERNS)
    assert {scene.background for scene in SCENES} == set(COLOURS)
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3}
    assert {t.name for s in SCENES for t in s.things} == set(SHAPES) | set(FIGURES)


def test_a_scene_is_the_same_image_every_time():
    first, again = world.draw_scene(3, 17), world.draw_scene(3, 17)
    assert first == again
    assert np.array_equal(np.asarray(first.render().image), np.asarray(again.render().image))
    assert first.caption != world.draw_scene(3, 18).caption or first.things != world.draw_scene(3, 18).things


def test_held_out_pairs_never_occur_in_training_scenes():
    pairs = {(t.name, t.colour) for scene in SCENES for t in scene.things if isinstance(t, Shape)}
    assert not pairs & set(world.held_out_pairs())
    assert pairs | set(world.held_out_pairs()) == {(s, c) for s in SHAPES for c in COLOURS}
    for shape in SHAPES:  # every shape and every colour is known, only not together
        assert any(not world.held_out(shape, colour) for colour in COLOURS)
    assert all(any(not world.held_out(shape, colour) for shape in SHAPES) for colour in COLOURS)


def test_subjects_are_figures_that_training_scenes_do_not_show():
    known = {(t.name, t.colours) for scene in SCENES for t in scene.things if isinstance(t, Figure)}
    assert not known & {(s.class_name, s.figure.colours) for s in world.subjects()}
    assert {s.class_name for s in world.subjects()} == set(FIGURES)
    assert len({(s.class_name, s.figure.colours, s.figure.styles) for s in world.subjects()}) == len(world.subjects())


@pytest.mark.parametrize("subject", world.subjects(), ids=lambda s: s.name)
def test_the_views_of_a_subject_differ_and_name_it(subject):
    views = [subject.view(k) for k in range(world.VIEWS)]
    images = {view.render().image.tobytes() for view in views}
    assert len(images) == world.VIEWS
    for view in views:
        assert view.caption.startswith(f"a photo of {world.TOKENS[0]} {subject.class_name} on a")
        assert view.background in view.caption
        assert view.background not in dict(subject.figure.colours).values()


def test_identifiers_are_kept_out_of_the_captions():
    assert not any(token in scene.caption.split() for scene in SCENES for token in world.TOKENS)


def test_captions_tell_the_truth_about_single_shapes():
    singles = [s for s in SCENES if len(s.things) == 1 and isinstance(s.things[0], Shape)]
    assert len(singles) > 300
    for scene in singles:
        thing, words = scene.things[0], scene.caption.replace(",", "").split()
        assert thing.name in words
        named = [word for word in words if word in COLOURS]
        assert set(named) <= {thing.colour, scene.background}


def test_a_figure_is_described_by_its_own_colours():
    figure = world.subjects()[0].figure
    for k in range(50):
        text = world.describe_figure(random.Random(k), figure)
        for part, colour in figure.colours:
            if part in text:
                assert f"{colour} {part}" in text


def test_semantic_maps_follow_the_image():
    scene = Scene((Shape("circle", "red", "large", 0.5, 0.5, 0.33),), "white", "plain", "map", "")
    image, labels = (np.asarray(x) for x in scene.render())
    assert image.shape == (SIZE, SIZE, 3) and labels.shape == (SIZE, SIZE)
    circle = labels == LABELS.index("circle")
    assert set(np.unique(labels)) == {0, LABELS.index("circle")}
    assert circle.mean() == pytest.approx(np.pi * (0.9 * 0.33) ** 2, rel=0.03)
    red = (image[..., 0] > 150) & (image[..., 1] < 100)
    assert (red == circle).mean() > 0.99


def test_a_figures_map_has_its_parts():
    for subject in world.subjects():
        values = {LABELS[v] for v in np.unique(np.asarray(subject.view(0).render().labels))}
        assert {f"{subject.class_name} {part}" for part in FIGURES[subject.class_name].parts} <= values


def test_map_images_give_every_class_its_own_colour():
    labels = Image.fromarray(np.arange(len(LABELS), dtype=np.uint8)[None])
    colours = {tuple(pixel) for pixel in np.asarray(label_image(labels))[0]}
    assert len(colours) == len(LABELS)


def test_words_of_the_world_are_single_tokens_and_other_words_are_pieces(tmp_path):
    tokenizer = build_tokenizer(tmp_path, captions=4000)
    words = set(SHAPES) | set(COLOURS) | set(FIGURES) | {p for f in FIGURES.values() for p in f.parts}
    assert {word for word in words if len(tokenizer.tokenize(word)) != 1} == set()
    assert tokenizer.tokenize("sks") == ["s", "k", "s</w>"]
    assert tokenizer.unk_token not in tokenizer.tokenize("Ünknown, wörds! 123")
    longest = max(len(tokenizer(scene.caption).input_ids) for scene in SCENES)
    assert longest <= PROMPT_LENGTH


def test_parts_are_small_enough_to_ship():
    count = sum(p.numel() for model in (build_unet(), build_vae()) for p in model.parameters())
    assert 2 * count < 17e6  # bytes in float16; the text encoder and CLIP take the rest of 20 MB
