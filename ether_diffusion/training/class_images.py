"""Class images for prior preservation: which are there, and how those that are missing are generated.

Generated images are files `class-<number>.png` beside the user's own; the number fixes the seed. An image is there
completely or not at all, so a run that was stopped, in whatever way, goes on where it was. Each says in itself what
it was generated from, so that those of another prompt, base or seed are not taken for this run's.

Source: DreamBooth, arXiv:2208.12242, section 3.3.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from accelerate.utils.memory import clear_device_cache
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ether_diffusion.dtypes import PRECISIONS
from ether_diffusion.errors import InputError, RunError
from ether_diffusion.files import nearest_existing, replace_file
from ether_diffusion.images import check_image, find_images, is_image, left_out, open_image, some
from ether_diffusion.training.accelerator import on_main_process
from ether_diffusion.training.checkpoints import with_fingerprint
from ether_diffusion.training.data.checking import check_all
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.entry import narrate
from ether_diffusion.training.families import Family, ModelSource
from ether_diffusion.training.options import PerformanceOptions, PriorOptions
from ether_diffusion.training.seeds import generator
from ether_diffusion.training.state import random_state, set_random_state

PREFIX = "class-"
ORIGIN_KEY = "ether_diffusion class image"
"""Of the text in a generated PNG file that says what it follows from."""

Origin = Mapping[str, str | int]
"""What a generated image follows from besides its number, by the names of flags."""


def origin_of(source: ModelSource, options: PriorOptions, seed: int) -> Origin:
    """What the images follow from that a run generates; of a local base model what it holds, wherever it lies."""
    base = with_fingerprint("", source.path).strip() or f"{source.path} {source.revision or ''}".strip()
    if source.vae is not None:
        base += f", with the autoencoder {with_fingerprint(source.vae, source.vae)}"
    return {"class_prompt": str(options.class_prompt), "pretrained_model_name_or_path": base, "seed": seed}


def check_class_images(source: ModelSource, options: PriorOptions, seed: int) -> None:
    """Make sure that the images that are there can be used, and that those that are missing can be generated.

    Raises:
        InputError: as `find_class_images`, and for damaged images.
    """
    paths, _ = find_class_images(options, origin_of(source, options, seed))
    check_all(lambda number: check_image(paths[number]), lambda number: paths[number].name, len(paths))
    folder = Path(str(options.class_data_dir))
    if folder.is_dir() and (names := left_out(folder, [each for each in folder.iterdir() if is_image(each)])):
        narrate("--class_data_dir %s: not read: %s", folder, some(names))


def find_class_images(options: PriorOptions, origin: Origin | None = None) -> tuple[list[Path], list[Path]]:
    """The images that are there and will be used, in a stable order, and the files to generate.

    Together they make `num_class_images`; the new files have the lowest free numbers. The user's own images and images
    generated earlier both count; hidden files and files of other kinds do not. Nothing is created or written.

    origin: of the run's own; images that say that they were generated from something else are refused. None takes
        them all.

    Raises:
        InputError: images of another origin, or `class_data_dir` is a file, cannot be read, or lacks images and cannot
            be written.
    """
    folder = Path(str(options.class_data_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--class_data_dir {folder}: is a file, needs a folder, or a path where one can be made")
    paths: list[Path] = []
    try:
        with contextlib.suppress(InputError):  # no folder, or no image in it yet
            paths = find_images(folder, "--class_data_dir")[: options.num_class_images]
        # After the images: one that comes in between is not used, and not generated over either.
        taken = set(os.listdir(folder)) if folder.is_dir() else set()
    except OSError as error:
        raise InputError(f"--class_data_dir {folder}: cannot be read ({error})") from error
    if origin is not None:
        _check_origin(paths, origin, folder)
    free = (name for name in map(f"{PREFIX}{{:05d}}.png".format, count()) if name not in taken)
    missing = [folder / name for name in islice(free, options.num_class_images - len(paths))]
    if missing:
        _check_writable(folder, len(missing))
    return paths, missing


def generate_class_images(
    source: ModelSource,
    family: type[Family],
    options: PriorOptions,
    accelerator: Accelerator,
    *,
    precision: str,
    seed: int,
    target: Target,
    performance: PerformanceOptions | None = None,
    num_inference_steps: int = 50,
) -> list[Path]:
    """Generate the class images that are missing, with the base model, and return the paths of all of them.

    Called by every process; each generates its share, and returns the same list when all are done, in the order in
    which `find_class_images` finds them from then on. An image depends on the seed and its number, not on the number
    of processes or on what was there before, and on the batch size only by rounding (invisible in float32, not always
    in 16 bits). The pipeline is loaded only by a process that has something to generate, and freed before the return;
    the global random generators are left as they were found.

    Args:
        source, family: the base model.
        options: the prompt, where the images lie, and how many there are to be.
        accelerator, precision, seed: of the training; `prior_generation_precision` goes before its precision.
        target: (height, width) of training images.
        performance: how the model is kept and decoded with.
        num_inference_steps: denoising steps per image.

    Raises:
        InputError: the folder cannot be used, the model cannot be read, or a batch does not fit into the memory.
        FloatingPointError: the model gives images that are not finite.
        OSError: the disk is full, or the folder cannot be written any more.
        RuntimeError: anything else that stops the generating.
            What is generated stays, and the message says how much there is.
    """
    # One process looks: another would count the images that the fast ones have generated by then.
    origin = origin_of(source, options, seed)
    paths, missing = on_main_process(accelerator, lambda: _prepare(options, origin))
    share = missing[accelerator.process_index :: accelerator.num_processes]
    if share:
        dtype = (PRECISIONS | {"fp32": torch.float32})[options.prior_generation_precision or precision]
        state = random_state()
        try:
            with _errors_with_progress(options):
                _generate(
                    _load(source, family, dtype, performance),
                    share,
                    options,
                    accelerator,
                    origin=origin,
                    target=target,
                    steps=num_inference_steps,
                )
        finally:
            set_random_state(state)
        clear_device_cache(garbage_collection=True)  # modules and their hooks refer to each other
    accelerator.wait_for_everyone()
    if missing:
        # Looked at anew for the order: it is to be that of the runs to come.
        paths, missing = on_main_process(accelerator, lambda: find_class_images(options, origin))
    if missing:
        raise RunError(f"images were removed while others were generated: {_progress(options)}")
    return paths


def _check_origin(paths: Sequence[Path], origin: Origin, folder: Path) -> None:
    """Refuse images that say that they were generated from something else than this run would."""
    silent = []
    for path in paths:
        with open_image(path) as image:
            text = image.info.get(ORIGIN_KEY)
        if text is None:
            silent += [path.name] if path.name.startswith(PREFIX) else []
            continue
        try:
            other = json.loads(text)
            different = [name for name in origin if other[name] != origin[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: does not say what it was generated from ({error}); remove it") from error
        if different:
            then, now = (", ".join(f"--{name} {each[name]!r}" for name in different) for each in (other, origin))
            raise InputError(
                f"--class_data_dir {folder}: {path.name} was generated with {then}, and this run has {now}; take "
                f"another folder, or remove the images that were generated ({PREFIX}*.png)"
            )
    if silent:
        narrate("--class_data_dir %s: taken as your own, as nothing says what made them: %s", folder, some(silent))


def _load(
    source: ModelSource, family: type[Family], dtype: torch.dtype, performance: PerformanceOptions | None
) -> Family:
    if performance is None:
        return family.load(source, dtype)
    loaded = family.load(source, dtype, performance.quantize)
    loaded.vae_tiling = performance.vae_tiling
    return loaded


def _check_writable(folder: Path, missing: int) -> None:
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise InputError(f"--class_data_dir {folder}: {nearest} is a file, no folder can be made in it")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"--class_data_dir {folder}: lacks {missing} images of the class, but {nearest} cannot be written to; "
            "take another folder, or put the images there"
        )


def _prepare(options: PriorOptions, origin: Origin) -> tuple[list[Path], list[Path]]:
    """Look, and make the folder if there is something to generate."""
    paths, missing = find_class_images(options, origin)
    if missing:
        folder = missing[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--class_data_dir {folder}: cannot be created ({error})") from error
    return paths, missing


@contextlib.contextmanager
def _errors_with_progress(options: PriorOptions) -> Iterator[None]:
    """A context that adds to an error how many images there are and how to go on."""
    try:
        yield
    except (InputError, FloatingPointError):
        raise
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{_progress(options)};") from stop
    except torch.OutOfMemoryError as error:
        fits = f"from 1 to {options.sample_batch_size - 1}"
        if options.sample_batch_size == 1:
            fits = "--prior_generation_precision fp16 or bf16, or a device with more memory"
        raise InputError(
            f"--sample_batch_size {options.sample_batch_size}: the memory is not enough ({error}); needs {fits}; "
            f"{_progress(options)}"
        ) from error
    except OSError as error:
        raise OSError(
            f"--class_data_dir {options.class_data_dir}: an image could not be saved ({error}); {_progress(options)}"
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"generating the class images failed ({type(error).__name__}: {error}); {_progress(options)}"
        ) from error


def _progress(options: PriorOptions) -> str:
    """The end of an error message: how many images there are, and how to go on."""
    folder = Path(str(options.class_data_dir))
    try:
        done = len(find_images(folder)[: options.num_class_images])
    except (InputError, OSError):
        done = 0
    return f"{done} of {options.num_class_images} images are in {folder}; the same command generates the others"


def _generate(
    family: Family,
    paths: Sequence[Path],
    options: PriorOptions,
    accelerator: Accelerator,
    *,
    origin: Origin,
    target: Target,
    steps: int,
) -> None:
    """Generate these files. The caller keeps no reference to the family, so that it goes with this call."""
    family.freeze(accelerator.device)
    family.pipe.set_progress_bar_config(disable=True)
    size = options.sample_batch_size
    said = PngInfo()
    said.add_text(ORIGIN_KEY, json.dumps(dict(origin)))
    with tqdm(total=len(paths), desc="class images") as bar:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            # A short batch is filled up: rounding depends on the shape of the batch, which would depend on how many
            # images an earlier run has generated.
            filled = [*batch, *batch[-1:] * (size - len(batch))]
            numbers = [int(path.stem.removeprefix(PREFIX)) for path in filled]
            generators = [generator(int(origin["seed"]), "class picture", number) for number in numbers]
            prompts = [str(options.class_prompt)] * size
            output = family.generate(
                prompts,
                num_inference_steps=steps,
                generator=generators,
                output_type="np",
                **family.size_inputs(target),
            )
            values = output.images  # (b, h, w, 3), from 0 to 1
            if not np.isfinite(values).all():
                # As an image it would be black, and training would teach the class to be black.
                dtype = str(family.pipe.dtype).removeprefix("torch.")
                raise FloatingPointError(
                    f"the pipeline generated images that are not finite in {dtype}; generate with "
                    f"--prior_generation_precision fp32 or bf16; {_progress(options)}"
                )
            for path, image in zip(batch, (values * 255).round().astype(np.uint8), strict=False):  # not what fills up
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG", pnginfo=said)
                replace_file(path, buffer.getvalue())
                bar.update()
