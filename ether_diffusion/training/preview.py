"""Sample pictures: base and tuned model side by side, from the same seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ether_diffusion.layers import EtherLayer
from ether_diffusion.training.options import ValidationOptions

SMALLEST_CELL = 128  # pixels; smaller pictures are enlarged, so that a person can see them
GAP, FONT_SIZE = 8, 16


@contextmanager
def base_model(models: Iterable[nn.Module]) -> Iterator[None]:
    """The models without their ETHER adapters; on leaving, every layer is as it was."""
    layers = [module for model in models for module in model.modules() if isinstance(module, EtherLayer)]
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.scaling.update, dict(layer.scaling))
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield


@torch.no_grad()
def paint(pipe: DiffusionPipeline, prompt: str, options: ValidationOptions, seed: int) -> list[Image.Image]:
    """`num_validation_images` pictures of a prompt, from the seeds `seed`, `seed + 1`, …"""
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        # One at a time: large pictures side by side need more memory than the training did.
        return [
            pipe(
                prompt,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=torch.Generator().manual_seed(seed + k),
            ).images[0]
            for k in range(options.num_validation_images)
        ]
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **quiet})


def side_by_side(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Titled rows of equal pictures as one picture."""
    width, height = rows[0][1][0].size
    factor = -(-SMALLEST_CELL // min(width, height)) if min(width, height) < SMALLEST_CELL else 1
    cell = (width * factor, height * factor)
    font = ImageFont.load_default(FONT_SIZE)
    columns = max(len(pictures) for _, pictures in rows)
    row_height = cell[1] + FONT_SIZE + 3 * GAP
    canvas = Image.new("RGB", (columns * (cell[0] + GAP) + GAP, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, pictures) in enumerate(rows):
        draw.text((GAP, k * row_height + GAP), _shortened(title, canvas.width - 2 * GAP, font), "black", font)
        for j, picture in enumerate(pictures):
            place = (GAP + j * (cell[0] + GAP), k * row_height + FONT_SIZE + 2 * GAP)
            canvas.paste(picture.resize(cell, Image.Resampling.NEAREST), place)
    return canvas


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def compare(
    pipe: DiffusionPipeline,
    models: Sequence[nn.Module],
    prompts: Sequence[str],
    options: ValidationOptions,
    seed: int,
) -> tuple[Image.Image, list[Image.Image]]:
    """For every prompt a row of the base model above a row of the tuned one, and the tuned pictures alone.

    Args:
        pipe: the pipeline with its adapters.
        models: its adapted components.
        prompts: one pair of rows each.
        options: pictures per prompt, steps, guidance.
        seed: of the first picture of each row.
    """
    rows: list[tuple[str, list[Image.Image]]] = []
    for prompt in prompts:
        with base_model(models):
            rows.append((f"base: {prompt}", paint(pipe, prompt, options, seed)))
        rows.append((f"tuned: {prompt}", paint(pipe, prompt, options, seed)))
    return side_by_side(rows), [picture for _, pictures in rows[1::2] for picture in pictures]
