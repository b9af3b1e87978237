"""Class images say what they were generated from, and those of another run are not taken for this one's."""

import shutil

import pytest
from diffusers import StableDiffusionPipeline
from helpers.class_images import PROMPT, SEED, contents, prior, put
from helpers.scripts import refusal
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ether_diffusion.errors import InputError
from ether_diffusion.training.class_images import ORIGIN_KEY, check_class_images
from ether_diffusion.training.families import ModelSource


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("changed", ["class_prompt", "seed", "pretrained_model_name_or_path", "all"])
def test_images_of_another_prompt_base_or_seed_are_refused_and_nothing_changes(
    generate, watched, wider_pipeline_folder, tmp_path, changed, missing
):
    others = {
        "class_prompt": {"class_prompt": "a drawing of a “dog”"},
        "seed": {"seed": SEED + 1},
        "pretrained_model_name_or_path": {"model": wider_pipeline_folder},
    }
    others["all"] = {name: value for other in others.values() for name, value in other.items()}
    put(tmp_path, "rex.jpg")
    generate(tmp_path, number=3, **others[changed])
    before, loaded = contents(tmp_path), len(watched.loaded)
    flags = list(others)[:3] if changed == "all" else [changed]
    told = ".*".join(f"--{name}" for name in sorted(flags, key=["class_prompt", flags[-1], "seed"].index))
    with pytest.raises(InputError, match=f"class-00000.png was generated with .*{told}.*, and this run has .*{told}"):
        generate(tmp_path, number=3 + missing)
    assert contents(tmp_path) == before and len(watched.loaded) == loaded


@pytest.mark.parametrize(
    "other", [{"sample_batch_size": 1}, {"prior_generation_precision": "bf16"}, {"number": 2}, {"model": "moved"}, {}]
)
def test_images_of_the_same_origin_are_taken_whatever_else_differs(generate, tiny_pipeline_folder, tmp_path, other):
    folder = tmp_path / "dogs"
    paths = generate(folder, number=3)
    before = contents(folder)
    if "model" in other:
        other = {"model": shutil.copytree(tiny_pipeline_folder, tmp_path / "moved")}
    assert generate(folder, **{"number": 3, **other}) == paths[: other.get("number", 3)]
    assert contents(folder) == before


def test_images_that_say_nothing_are_ones_own_and_named_where_they_look_generated(generate, tmp_path, caplog):
    caplog.set_level("INFO")
    put(tmp_path, "rex.jpg", "class-00000.png")
    generate(tmp_path, number=3)
    assert "taken as your own, as nothing says what made them: class-00000.png" in caplog.text
    assert "rex.jpg" not in caplog.text


def test_an_origin_that_cannot_be_read_is_refused(generate, tmp_path):
    text = PngInfo()
    text.add_text(ORIGIN_KEY, "{")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(InputError, match="a.png: does not say what it was generated from"):
        generate(tmp_path, number=1)


@pytest.mark.parametrize("fault", ["truncated", "prompt"])
def test_class_images_are_checked_before_any_weights_are_read(
    train, generate, tmp_path, monkeypatch, capsys, caplog, fault
):
    folder = tmp_path / "dogs"
    generate(folder, number=2, seed=0)
    (folder / "b.jxl").write_bytes(b"\xff\x0a")
    path = folder / "class-00001.png"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    prompt = "a cat" if fault == "prompt" else PROMPT
    flags = ("--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", prompt)
    told = refusal(capsys, train, *flags, "--num_class_images", 3)
    wanted = {"truncated": "class-00001.png: the image is truncated", "prompt": f"with --class_prompt '{PROMPT}'"}
    assert wanted[fault] in told


def test_what_is_left_out_of_class_images_is_named(tmp_path, tiny_pipeline_folder, caplog):
    caplog.set_level("INFO")
    put(tmp_path, "rex.jpg", "fido.jpg")
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a")
    check_class_images(ModelSource(str(tiny_pipeline_folder)), prior(tmp_path, 1), SEED)
    assert caplog.messages == [f"--class_data_dir {tmp_path}: not read: b.jxl"]
