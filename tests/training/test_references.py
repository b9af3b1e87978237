"""Reference images of editors: which goes with which image, and what is learned from them."""

import shutil

import pytest
import torch
from helpers.flow_runs import IMAGES, QUICK
from helpers.flow_zoo import WITH_PROCESSORS
from helpers.scripts import refusal, same
from PIL import Image
from transformers.utils import is_torchvision_available

from ether_diffusion.images import to_pixels
from ether_diffusion.training.data import TrainingImages, find_examples
from ether_diffusion.training.data.views import cut, shrink
from ether_diffusion.training.families import ModelSource, family_at
from ether_diffusion.training.objectives import ImageSet
from ether_diffusion.training.options import InstanceDataOptions

EDITORS = ("kontext", "klein", "flux2")


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("flags", [(), ("--cache_latents",)], ids=["", "cached"])
def test_editors_learn_from_reference_images(name, flags, flow_bases, train, references):
    base = ("--pretrained_model_name_or_path", flow_bases(name), "--resolution", 64, *QUICK, "--center_crop")
    plain = train(*base, output="plain")[1]
    result, folder = train(*base, *flags, *IMAGES, "--reference_dir", references, output="references")
    assert len(result.losses) == 2 and not same(plain, folder) and (folder / "grid.png").is_file()
    again = train(*base, "--reference_dir", references, output="again")[1]
    assert same(folder, again), "what is encoded before gives the same as what is encoded when its turn comes"


@pytest.mark.slow
@pytest.mark.skipif(not is_torchvision_available(), reason="transformers prepares images by means of torchvision")
@pytest.mark.parametrize("name", WITH_PROCESSORS)
def test_editors_whose_text_encoder_sees_the_reference_learn(name, flow_bases, train, references, capsys):
    base = ("--pretrained_model_name_or_path", flow_bases(name), "--resolution", 64, *QUICK)
    shown = ("--reference_dir", references)
    assert "--reference_dir: is missing" in refusal(capsys, train, *base)
    assert "add --cache_latents or --center_crop" in refusal(capsys, train, *base, *shown)
    kept = train(*base, *shown, "--center_crop", "--cache_latents", "--caption_dropout", 0.5, output="kept")[1]
    again = train(*base, *shown, "--center_crop", "--caption_dropout", 0.5, *IMAGES, output="again")[1]
    assert same(kept, again) and (again / "grid.png").is_file()


def test_what_an_editor_is_shown_is_the_reference_under_the_view_of_its_image(flow_bases, photographs, references):
    source = ModelSource(str(flow_bases("klein")))
    family = family_at(source).load(source, torch.float32)
    options = InstanceDataOptions(
        instance_data_dir=str(photographs), instance_prompt="a toy", reference_dir=str(references)
    )
    images = TrainingImages(find_examples(options), targets=[(32, 32)], random_flip=True, interpolation="lanczos")
    drawn = ImageSet(images, family, seed=0)
    for index in range(6):
        view, sample = images.view(index), drawn.draw(index)
        image = Image.open(references / f"{sorted(photographs.iterdir())[view.image].stem}.jpg")
        square = cut(shrink(image, (32, 32)), view, (32, 32))
        expected = family.latents.draw(family.latents.encode(to_pixels(square)), None)
        torch.testing.assert_close(sample.reference, expected)
        assert sample.control is None and sample.seen is None


def test_changed_references_are_other_data(flow_bases, train, references, tmp_path, capsys):
    flags = ("--pretrained_model_name_or_path", flow_bases("klein"), "--resolution", 64, "--checkpointing_steps", 1)
    train(*flags, "--max_train_steps", 2, "--reference_dir", references)
    other = tmp_path / "other"
    shutil.copytree(references, other)
    next(other.iterdir()).rename(other / "spare")
    shutil.copy(sorted(other.glob("*.jpg"))[0], other / f"{sorted(references.iterdir())[0].stem}.jpg")
    more = ("--reference_dir", other, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    assert "--instance_data_dir: was" in refusal(capsys, train, *flags, *more)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", "", "--reference_dir: StableDiffusion3Pipeline takes no reference images; drop it"),
        ("klein", "missing", "has no image of the name of 0.png"),
        ("klein", "twice", "have one name; remove one"),
        ("klein", "shape", "the reference image has 10x40 pixels and the image"),
    ],
)
def test_references_that_do_not_fit_are_refused(name, change, message, on, train, references, capsys, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(references, folder)
    first = folder / "0.jpg"
    if change == "missing":
        first.unlink()
    if change == "twice":
        shutil.copy(first, folder / "0.jpeg")
    if change == "shape":
        Image.new("RGB", (10, 40)).save(first)
    assert message in refusal(capsys, train, *on(name), *QUICK, "--reference_dir", folder)
