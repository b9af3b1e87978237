"""Class images for prior preservation: which are there, and generating those that are missing.

Generated images are files `class-<number>.png` beside the user's own; the number fixes the seed. An image is there
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
from ether_diffusion.training.options import PriorOptions
from ether_diffusion.training.seeds import generator

PREFIX, SUFFIX, PARTIAL_SUFFIX = "class-", ".png", ".tmp"
STALE_SECONDS = 3600
"""Half-written files of this age are of killed runs; younger ones may be of another run that generates just now."""

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ClassImages:
    """Which images of the class are there, and which are to be generated.

    paths: images that are there and will be used, in a stable order.
    missing: files to generate, so that paths and they make `num_class_images`. Their numbers are the lowest free ones.
    """

    paths: list[Path]
    missing: list[Path]

    @classmethod
    def look(cls, options: PriorOptions) -> ClassImages:
        """Read the folder; nothing is created or written.

        The user's own images and images generated earlier both count; hidden files and files of other kinds do not.

        Raises:
            InputError: `class_data_dir` is a file, cannot be read, or lacks images and cannot be written.
        """
        folder = Path(str(options.class_data_dir))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--class_data_dir {folder}: is a file, needs a folder, or a path where one can be made")
        paths: list[Path] = []
        try:
            with contextlib.suppress(InputError):  # no folder, or no image in it yet
                paths = find_images(folder, "--class_data_dir")
            # After the images: one that comes in between is not used, and not generated over either.
            taken = set(os.listdir(folder)) if folder.is_dir() else set()
        except OSError as error:
            raise InputError(f"--class_data_dir {folder}: cannot be read ({error})") from error
        paths = paths[: options.num_class_images]
        free = (name for name in map(_name, count()) if name not in taken)
        missing = [folder / name for name in islice(free, options.num_class_images - len(paths))]
        if missing:
            _check_writable(folder, len(missing))
        return cls(paths, missing)


def generate_class_images(
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
    """Generate the class images that are missing, with the base model, and return the paths of all of them.

    Called by every process; each generates its share, and returns the same list when all are done, in the order in
    which `ClassImages.look` finds them from then on. An image depends on the seed and its number, not on the number of
    processes or on what was there before, and on the batch size only by rounding (invisible in float32, not always in
    16 bits). The pipeline is loaded only by a process that has something to generate, and freed before the return; the
    global random generators are left as they were found.

    Args:
        source: the base model.
        family: its family.
        options: the prompt, where the images lie, and how many there are to be.
        accelerator: of the training.
        precision: of the training (no, fp16, bf16); `prior_generation_precision` goes before it.
        seed: of the run.
        num_inference_steps: denoising steps per image.
        guidance_scale: classifier-free guidance; None leaves it to the pipeline.

    Raises:
        InputError: the folder cannot be used, the model cannot be read, or a batch does not fit into the memory.
        FloatingPointError: the model gives images that are not finite.
        OSError: the disk is full, or the folder cannot be written any more.
        RuntimeError: anything else that stops the generating.
            What is generated stays, and the message says how much there is.
    """
    # One process looks: another would count the images that the fast ones have generated by then.
    pictures = on_main_process(accelerator, lambda: _prepare(options))
    share = pictures.missing[accelerator.process_index :: accelerator.num_processes]
    if share:
        state = random_state()
        try:
            with _told(options):
                _generate(
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
        pictures = on_main_process(accelerator, lambda: ClassImages.look(options))
    if pictures.missing:
        raise RuntimeError(f"images were removed while others were generated: {_progress(options)}")
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
            f"--class_data_dir {folder}: lacks {missing} images of the class, but {nearest} cannot be written to; "
            "take another folder, or put the images there"
        )


def _prepare(options: PriorOptions) -> ClassImages:
    """Look, make the folder if there is something to generate, and clear it of what killed runs left half-written."""
    pictures = ClassImages.look(options)
    if pictures.missing:
        folder = pictures.missing[0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--class_data_dir {folder}: cannot be created ({error})") from error
        for left in folder.glob(f".{PREFIX}*{SUFFIX}.*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):  # gone already, or another's; it is no image in any case
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()
    return pictures


@contextlib.contextmanager
def _told(options: PriorOptions) -> Iterator[None]:
    """Adds to an error what is generated and how to go on."""
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
            f"--class_data_dir {options.class_data_dir}: an image could not be saved ({error}); {_progress(options)}"
        ) from error
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_progress(options)}") from error
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
    seed: int,
    num_inference_steps: int,
    guidance_scale: float | None,
) -> None:
    """Generate these files. The caller keeps no reference to the family, so that it goes with this call."""
    family.freeze(accelerator.device)
    family.pipe.set_progress_bar_config(disable=True)
    size = options.sample_batch_size
    with tqdm(total=len(paths), desc="class pictures", disable=not accelerator.is_local_main_process) as bar:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            # A short batch is filled up: rounding depends on the shape of the batch, which would depend on how many
            # images an earlier run has generated.
            numbers = [_number(path) for path in (*batch, *batch[-1:] * (size - len(batch)))]
            images = _generate_batch(
                family.pipe,
                str(options.class_prompt),
                [generator(seed, "class picture", number) for number in numbers],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            for path, image in zip(batch, images, strict=False):  # without what fills up
                _write(path, image)
                bar.update()


def _generate_batch(
    pipe: DiffusionPipeline,
    prompt: str,
    generators: list[torch.Generator],
    *,
    num_inference_steps: int,
    guidance_scale: float | None,
) -> list[Image.Image]:
    """One image per generator."""
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    values = pipe(
        [prompt] * len(generators),
        num_inference_steps=num_inference_steps,
        generator=generators,
        output_type="np",
        **guidance,
    ).images  # (b, h, w, 3), 0 to 1
    if not np.isfinite(values).all():
        # As an image it would be black, and training would teach the class to be black.
        raise FloatingPointError(
            f"the pipeline generated images that are not finite in {str(pipe.dtype).removeprefix('torch.')}; "
            "generate with --prior_generation_precision fp32 or bf16"
        )
    return [Image.fromarray(value) for value in (values * 255).round().astype(np.uint8)]


def _write(path: Path, image: Image.Image) -> None:
    """Save an image, whole or not at all: under a hidden name, which `find_images` ignores, then renamed."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())
