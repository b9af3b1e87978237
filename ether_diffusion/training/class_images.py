"""Class pictures for prior preservation: which are there, and painting those that are missing.

Painted pictures are files `class-<number>.png` beside the user's own; the number fixes the seed. A picture is there
whole or not at all, so a run that was stopped, in whatever way, goes on where it was.

Source: DreamBooth, arXiv:2208.12242, section 3.3.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ether_diffusion.errors import InputError
from ether_diffusion.files import replace_file
from ether_diffusion.images import find_images
from ether_diffusion.training.checkpoints import random_state, set_random_state
from ether_diffusion.training.distributed import on_main_process
from ether_diffusion.training.families.base import Family, ModelSource
from ether_diffusion.training.options.groups import PriorOptions
from ether_diffusion.training.seeds import generator

PREFIX, SUFFIX, PARTIAL_SUFFIX = "class-", ".png", ".tmp"
STALE_SECONDS = 3600
"""Half-written files of this age are of killed runs; younger ones may be of another run that paints just now."""

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ClassPictures:
    """Which pictures of the class are there, and which are to be painted.

    paths: pictures that are there and will be used, in a stable order.
    missing: files to paint, so that paths and they make `num_class_images`. Their numbers are the lowest free ones.
    """

    paths: list[Path]
    missing: list[Path]

    @classmethod
    def look(cls, options: PriorOptions) -> ClassPictures:
        """Read the folder; nothing is created or written.

        The user's own pictures and pictures painted earlier both count; hidden files and files of other kinds do not.

        Raises:
            InputError: `class_data_dir` is a file, cannot be read, or lacks pictures and cannot be written.
        """
        folder = Path(str(options.class_data_dir))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--class_data_dir {folder}: is a file, needs a folder, or a path where one can be made")
        paths: list[Path] = []
        try:
            with contextlib.suppress(InputError):  # no folder, or no picture in it yet
                paths = find_images(folder, "--class_data_dir")
            # After the pictures: one that comes in between is not used, and not painted over either.
            taken = set(os.listdir(folder)) if folder.is_dir() else set()
        except OSError as error:
            raise InputError(f"--class_data_dir {folder}: cannot be read ({error})") from error
        paths = paths[: options.num_class_images]
        free = (name for name in map(_name, count()) if name not in taken)
        missing = [folder / name for name in islice(free, options.num_class_images - len(paths))]
        if missing:
            _check_writable(folder, len(missing))
        return cls(paths, missing)


def paint_class_pictures(
    source: ModelSource,
    family: type[Family],
    options: PriorOptions,
    accelerator: Accelerator,
    *,
    precision: str,
    seed: int,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
) -> list[Path]:
    """Paint the class pictures that are missing, with the base model, and return the paths of all of them.

    Called by every process; each paints its share, and returns the same list when all are done, in the order in which
    `ClassPictures.look` finds them from then on. A picture depends on the seed and its number, not on the number of
    processes or on what was there before, and on the batch size only by rounding (invisible in float32, not always in
    16 bits). The pipeline is loaded only by a process that has something to paint, and freed before the return; the
    global random generators are left as they were found.

    Args:
        source: the base model.
        family: its family.
        options: the prompt, where the pictures lie, and how many there are to be.
        accelerator: of the training.
        precision: of the training (no, fp16, bf16); `prior_generation_precision` goes before it.
        seed: of the run.
        num_inference_steps: denoising steps per picture.
        guidance_scale: classifier-free guidance; None leaves it to the pipeline.

    Raises:
        InputError: the folder cannot be used, the model cannot be read, or a batch does not fit into the memory.
        FloatingPointError: the model gives pictures that are not finite.
        OSError: the disk is full, or the folder cannot be written any more.
        RuntimeError: anything else that stops the painting.
            What is painted stays, and the message says how much there is.
    """
    # One process looks: another would count the pictures that the fast ones have painted by then.
    pictures = on_main_process(accelerator, lambda: _prepare(options))
    share = pictures.missing[accelerator.process_index :: accelerator.num_processes]
    if share:
        state = random_state()
        try:
            with _told(options):
                _paint(
                    family.load(source, DTYPES[options.prior_generation_precision or precision]),
                    share,
                    options,
                    accelerator,
                    seed=seed,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                )
        finally:
            set_random_state(state)
        clear_device_cache(garbage_collection=True)  # modules and their hooks refer to each other
    accelerator.wait_for_everyone()
    if pictures.missing:
        # Looked at anew for the order: it is to be that of the runs to come.
        pictures = on_main_process(accelerator, lambda: ClassPictures.look(options))
    if pictures.missing:
        raise RuntimeError(f"pictures were removed while others were painted: {_progress(options)}")
    return pictures.paths


def _name(number: int) -> str:
    return f"{PREFIX}{number:05d}{SUFFIX}"


def _number(path: Path) -> int:
    return int(path.stem.removeprefix(PREFIX))


def _check_writable(folder: Path, missing: int) -> None:
    """Ask the folder, or the nearest of its parents that is there, whether files can be made in it."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise InputError(f"--class_data_dir {folder}: {nearest} is a file, no folder can be made in it")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"--class_data_dir {folder}: lacks {missing} pictures of the class, but {nearest} cannot be written to; "
            "take another folder, or put the pictures there"
        )


def _prepare(options: PriorOptions) -> ClassPictures:
    """Look, make the folder if there is something to paint, and clear it of what killed runs left half-written."""
    pictures = ClassPictures.look(options)
    if pictures.missing:
        folder = pictures.missing[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--class_data_dir {folder}: cannot be created ({error})") from error
        for left in folder.glob(f".{PREFIX}*{SUFFIX}.*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):  # gone already, or another's; it is no picture in any case
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
    return pictures


@contextlib.contextmanager
def _told(options: PriorOptions) -> Iterator[None]:
    """Adds to an error what is painted and how to go on."""
    try:
        yield
    except InputError:
        raise
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
            f"--class_data_dir {options.class_data_dir}: a picture could not be saved ({error}); {_progress(options)}"
        ) from error
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_progress(options)}") from error
    except Exception as error:
        raise RuntimeError(
            f"painting the class pictures failed ({type(error).__name__}: {error}); {_progress(options)}"
        ) from error


def _progress(options: PriorOptions) -> str:
    """The end of an error message: how many pictures there are, and how to go on."""
    folder = Path(str(options.class_data_dir))
    try:
        done = len(find_images(folder)[: options.num_class_images])
    except (InputError, OSError):
        done = 0
    return f"{done} of {options.num_class_images} pictures are in {folder}; the same command paints the others"


def _paint(
    family: Family,
    paths: Sequence[Path],
    options: PriorOptions,
    accelerator: Accelerator,
    *,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float | None,
) -> None:
    """Paint these files. The caller keeps no reference to the family, so that it goes with this call."""
    family.freeze(accelerator.device)
    family.pipe.set_progress_bar_config(disable=True)
    size = options.sample_batch_size
    with tqdm(total=len(paths), desc="class pictures", disable=not accelerator.is_local_main_process) as bar:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            # A short batch is filled up: rounding depends on the shape of the batch, which would depend on how many
            # pictures an earlier run has painted.
            numbers = [_number(path) for path in (*batch, *batch[-1:] * (size - len(batch)))]
            images = _paint_batch(
                family.pipe,
                str(options.class_prompt),
                [generator(seed, "class picture", number) for number in numbers],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            for path, image in zip(batch, images, strict=False):  # without what fills up
                _write(path, image)
                bar.update()


def _paint_batch(
    pipe: DiffusionPipeline,
    prompt: str,
    generators: list[torch.Generator],
    *,
    num_inference_steps: int,
    guidance_scale: float | None,
) -> list[Image.Image]:
    """One picture per generator."""
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    values = pipe(
        [prompt] * len(generators),
        num_inference_steps=num_inference_steps,
        generator=generators,
        output_type="np",
        **guidance,
    ).images  # (b, h, w, 3), 0 to 1
    if not np.isfinite(values).all():
        # As a picture it would be black, and training would teach the class to be black.
        raise FloatingPointError(
            f"the pipeline painted pictures that are not finite in {str(pipe.dtype).removeprefix('torch.')}; "
            "paint with --prior_generation_precision fp32 or bf16"
        )
    return [Image.fromarray(value) for value in (values * 255).round().astype(np.uint8)]


def _write(path: Path, image: Image.Image) -> None:
    """Save a picture, whole or not at all: under a hidden name, which `find_images` ignores, then renamed."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())
