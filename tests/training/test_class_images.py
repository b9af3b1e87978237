"""Class images: the user's own count, those that are missing are generated, and a stop in between changes nothing."""

import errno
import gc
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.class_images import PROMPT, SEED, STEPS, Watched, contents, names, pixels, prior, put
from helpers.processes import in_processes
from torch.multiprocessing import ProcessExitedException

from ether_diffusion import miniature
from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images
from ether_diffusion.training.class_images import find_class_images, generate_class_images
from ether_diffusion.training.families import ModelSource, StableDiffusion
from ether_diffusion.training.seeds import derive


def look(folder: Path, number: int) -> tuple[list[str], list[str]]:
    """The names of images that are there, and of those to generate."""
    paths, missing = find_class_images(prior(folder, number))
    return [path.name for path in paths], [path.name for path in missing]


# Looking --------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_lacks_all_images_and_is_not_made(tmp_path):
    assert look(tmp_path / "images" / "dogs", 3) == ([], ["class-00000.png", "class-00001.png", "class-00002.png"])
    assert names(tmp_path) == []


def test_images_of_ones_own_count_whatever_their_format_and_other_files_do_not(tmp_path):
    put(tmp_path, "rex.jpg", "fido.webp", "BELLO.PNG", ".hidden.png")
    (tmp_path / "notes.txt").write_text("three dogs")
    paths, missing = look(tmp_path, 5)
    assert sorted(paths) == ["BELLO.PNG", "fido.webp", "rex.jpg"]
    assert missing == ["class-00000.png", "class-00001.png"]


def test_of_more_images_than_asked_for_the_first_are_taken(tmp_path):
    put(tmp_path, "10.png", "9.png", "2.png", "1.png")
    assert look(tmp_path, 3) == (["1.png", "2.png", "9.png"], [])


def test_generated_images_are_numbered_into_the_gaps(tmp_path):
    put(tmp_path, "class-00001.png", "rex.jpg")
    (tmp_path / "class-00002.png").mkdir()  # a name that is taken, though not by an image
    assert look(tmp_path, 5)[1] == ["class-00000.png", "class-00003.png", "class-00004.png"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    file = tmp_path / "dogs"
    file.write_text("")
    with pytest.raises(InputError, match=f"--class_data_dir {file}: is a file, needs a folder"):
        find_class_images(prior(file))
    with pytest.raises(InputError, match=f"--class_data_dir {file}/young: {file} is a file, no folder can be made"):
        find_class_images(prior(file / "young"))


def test_a_folder_that_cannot_be_written_is_an_error_only_where_images_are_missing(tmp_path, monkeypatch):
    put(tmp_path, "rex.jpg", "fido.png")
    # The superuser may write everywhere; so the answer of the system is set.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert len(look(tmp_path, 2)[0]) == 2
    with pytest.raises(InputError, match=f"lacks 1 images of the class, but {tmp_path} cannot be written to"):
        find_class_images(prior(tmp_path, 3))
    with pytest.raises(InputError, match=f"--class_data_dir {tmp_path}/a/b: .* but {tmp_path} cannot be written to"):
        find_class_images(prior(tmp_path / "a" / "b", 3))


# Generating -------------------------------------------------------------------------------------------------------


def test_missing_images_are_generated_beside_those_of_the_user_which_stay_as_they_are(generate, tmp_path):
    own = put(tmp_path / "dogs", "rex.jpg", "class-00001.png")
    paths = generate(tmp_path / "dogs", number=5)
    assert [path.name for path in paths] == names(tmp_path / "dogs")
    assert find_class_images(prior(tmp_path / "dogs", 5)) == (paths, [])  # in the order of the runs to come
    assert names(tmp_path / "dogs") == [*(f"class-0000{k}.png" for k in range(4)), "rex.jpg"]
    assert own.items() <= contents(tmp_path / "dogs").items()
    generated = [pixels(tmp_path / "dogs" / f"class-0000{k}.png") for k in (0, 2, 3)]
    assert {each.shape for each in generated} == {(16, 16, 3)}
    assert all(np.abs(a - b).max() > 0.05 * 255 for a, b in zip(generated, generated[1:], strict=False))


def test_an_image_is_what_the_pipeline_generates_from_its_number(generate, tiny_pipeline, tmp_path):
    generate(tmp_path, number=3)
    seed = torch.Generator().manual_seed(derive(SEED, "class picture", 2))
    image = tiny_pipeline(PROMPT, num_inference_steps=STEPS, generator=seed).images[0]  # with its own guidance scale
    assert np.abs(pixels(tmp_path / "class-00002.png") - np.asarray(image, dtype=np.int16)).max() <= 1


def test_another_seed_generates_other_images(generate, tmp_path):
    for seed in (0, 1):
        generate(tmp_path / str(seed), number=1, seed=seed)
    one, other = (pixels(tmp_path / str(seed) / "class-00000.png") for seed in (0, 1))
    assert np.abs(one - other).max() > 0.05 * 255


def test_the_batch_size_changes_no_image(generate, tmp_path):
    for size in (1, 3, 4):
        generate(tmp_path / str(size), number=5, sample_batch_size=size)
    for name in names(tmp_path / "1"):
        for size in ("3", "4"):
            assert np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / size / name)).max() <= 1


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({"number": 7, "sample_batch_size": 3}, (0, 3, 4, 6)),
        # In bfloat16 the miniature's images differ visibly with the shape of the batch, so that must not change.
        ({"model": miniature.FOLDER, "precision": "bf16", "number": 4, "sample_batch_size": 4}, (2,)),
    ],
    ids=["float32", "bfloat16"],
)
def test_images_that_were_removed_are_generated_again_bit_for_bit(generate, tmp_path, options, removed):
    paths = generate(tmp_path, **options)
    before = contents(tmp_path)
    for k in removed:
        (tmp_path / f"class-0000{k}.png").unlink()
    assert generate(tmp_path, **options) == paths and contents(tmp_path) == before


def test_nothing_is_loaded_where_nothing_is_missing(generate, watched, tmp_path):
    put(tmp_path, "rex.jpg", "fido.jpg")
    before = contents(tmp_path)
    assert generate(tmp_path, number=2) == find_images(tmp_path)
    assert watched.loaded == [] and contents(tmp_path) == before


def test_the_pipeline_is_freed(generate, watched, tmp_path):
    gc.disable()  # what is freed is freed by the generating itself
    try:
        generate(tmp_path, number=1)
        assert [reference() for reference in watched.loaded[0][2:]] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("training", "flag", "dtype"),
    [
        ("no", None, torch.float32),
        ("bf16", None, torch.bfloat16),
        ("bf16", "no", torch.float32),
        ("fp16", "fp32", torch.float32),
        ("no", "bf16", torch.bfloat16),
    ],
)
def test_the_precision_is_that_of_the_training_unless_another_is_given(
    generate, watched, tmp_path, training, flag, dtype
):
    generate(tmp_path, number=1, sample_batch_size=1, precision=training, prior_generation_precision=flag)
    assert [each[:2] for each in watched.loaded] == [(dtype, {dtype})]


def test_the_global_random_generators_are_left_as_they_were(generate, watched, tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def stir(pipe):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    watched.prepare = staticmethod(stir)
    generate(tmp_path, number=1)
    assert draws() == expected


# Stops ----------------------------------------------------------------------------------------------------------


def failing(error: Exception, batch: int):
    """A change to a pipeline: its denoiser raises an error in some batch."""

    def prepare(pipe):
        calls = []

        def count(*_):
            calls.append(None)
            if len(calls) > (batch - 1) * STEPS:
                raise error

        pipe.unet.register_forward_pre_hook(count)

    return staticmethod(prepare)


@pytest.mark.parametrize("number", ["2", "1"])
def test_out_of_memory_keeps_what_is_generated_and_says_what_fits(generate, watched, tmp_path, number):
    watched.prepare = failing(torch.OutOfMemoryError("CUDA out of memory"), batch=2)
    fits = "needs from 1 to 1" if number == "2" else "needs --prior_generation_precision fp16 or bf16"
    with pytest.raises(InputError, match=f"--sample_batch_size {number}: the memory is not enough .*{fits}") as caught:
        generate(tmp_path, number=4, sample_batch_size=int(number))
    assert f"{number} of 4 images are in {tmp_path}; the same command generates the others" in str(caught.value)
    assert len(names(tmp_path)) == int(number)


def test_any_other_error_keeps_what_is_generated_and_the_same_command_goes_on(generate, watched, tmp_path):
    generate(tmp_path / "whole", number=4, sample_batch_size=2)
    watched.prepare = failing(KeyError("lost"), batch=2)
    with pytest.raises(RuntimeError, match=r"failed \(KeyError: 'lost'\); 2 of 4 images are in"):
        generate(tmp_path / "dogs", number=4, sample_batch_size=2)
    watched.prepare = Watched.prepare
    generate(tmp_path / "dogs", number=4, sample_batch_size=2)
    assert contents(tmp_path / "dogs") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_whole_images_only(generate, tmp_path, monkeypatch):
    left, sync = [4], os.fsync  # two for each: the file, then its folder

    def fsync(handle):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="could not be saved .*No space left on device.*; 2 of 5 images are in"):
        generate(tmp_path, number=5)
    assert names(tmp_path) == ["class-00000.png", "class-00001.png"]


def test_images_that_are_not_finite_are_not_kept(generate, watched, tmp_path):
    watched.prepare = staticmethod(lambda pipe: pipe.vae.decoder.conv_out.bias.data.fill_(float("nan")))
    with pytest.raises(FloatingPointError, match="not finite in bfloat16; .*0 of 1 images"):
        generate(tmp_path, number=1, precision="bf16")
    assert names(tmp_path) == []


def test_half_written_files_are_no_images_and_go_when_they_are_old(generate, tmp_path):
    old, young = tmp_path / ".class-00000.png.0a.tmp", tmp_path / ".class-00001.png.0b.tmp"
    for each in (old, young):
        each.write_bytes(b"\x89PNG")
    os.utime(old, (time.time() - 7200,) * 2)
    paths = generate(tmp_path, number=2, sample_batch_size=2)
    assert [path.name for path in paths] == ["class-00000.png", "class-00001.png"]
    assert names(tmp_path) == [young.name, "class-00000.png", "class-00001.png"]


def test_a_model_that_cannot_be_read_is_named(accelerator, tmp_path):
    source = ModelSource(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="--pretrained_model_name_or_path .*nowhere: there is no such folder"):
        generate_class_images(
            source, StableDiffusion, prior(tmp_path / "dogs"), accelerator, precision="no", seed=0, target=(16, 16)
        )


# Processes ------------------------------------------------------------------------------------------------------


def _generate_and_die(accelerator, folder, arguments, syncs):
    """Be killed after so many files and folders have come to the disk."""
    sync, written = os.fsync, []

    def fsync(handle):
        sync(handle)
        written.append(handle)
        if len(written) == syncs:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    generate_class_images(
        *arguments, accelerator, precision="no", seed=SEED, target=(16, 16), num_inference_steps=STEPS
    )


def test_a_run_that_was_killed_goes_on_and_generates_the_same_bit_for_bit(generate, tiny_pipeline_folder, tmp_path):
    options = {"number": 10, "sample_batch_size": 4}
    folder = tmp_path / "killed"
    arguments = (ModelSource(str(tiny_pipeline_folder)), StableDiffusion, prior(folder, **options))
    # After the sixth image is written and before it has its name; each is synced with its folder.
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(1, _generate_and_die, folder, arguments, 11)
    left = {name: content for name, content in contents(folder).items() if not name.startswith(".")}
    assert len(left) == 5 < len(contents(folder))
    paths = generate(folder, **options)
    generate(tmp_path / "whole", **options)
    assert {path.name: path.read_bytes() for path in paths} == contents(tmp_path / "whole")
    assert left.items() <= contents(folder).items()


def _generate_and_report(accelerator, folder, arguments):
    paths = generate_class_images(
        *arguments, accelerator, precision="no", seed=SEED, target=(16, 16), num_inference_steps=STEPS
    )
    assert all(path.exists() for path in paths)
    folder.with_suffix(f".{accelerator.process_index}").write_text(" ".join(path.name for path in paths))


@pytest.mark.slow
def test_two_processes_generate_what_one_generates(generate, tiny_pipeline_folder, tmp_path):
    options = {"number": 8, "sample_batch_size": 2}
    folder = tmp_path / "two"
    own = put(folder, "rex.jpg")
    arguments = (ModelSource(str(tiny_pipeline_folder)), StableDiffusion, prior(folder, **options))
    in_processes(2, _generate_and_report, folder, arguments)
    for k in (0, 1):
        assert folder.with_suffix(f".{k}").read_text().split() == names(folder)
    put(tmp_path / "one", "rex.jpg")
    generate(tmp_path / "one", **options)
    assert names(folder) == names(tmp_path / "one")
    assert (folder / "rex.jpg").read_bytes() == own["rex.jpg"]
    for name in names(folder):
        assert np.abs(pixels(folder / name) - pixels(tmp_path / "one" / name)).max() <= 1
