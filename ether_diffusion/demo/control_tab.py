"""The tab that generates under the control of a map, with a light-control adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ether_diffusion.demo.generate_tab import choices, paint, whole
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_GUIDANCE,
    HIGHEST_SEED,
    HIGHEST_STRENGTH,
    LARGEST_MAP,
    LONGEST_PROMPT,
    MOST_STEPS,
    Settings,
    read_image,
)
from ether_diffusion.demo.widgets import image_boxes, size_sliders
from ether_diffusion.demo.words import STRENGTH_NOTE, note, problem, status
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

MOST_BRUSHES = 12


def control_tab(worker: Worker, results: Results) -> gr.Dropdown:
    """Build the tab; its list of adapters. It starts with what the first adapter's image was generated from."""
    offered = choices(worker, control=True)
    if not offered:
        gr.Markdown(
            "There is no control adapter in the folder. `train_controlnet_ether.py` trains one; put its output folder "
            "into the folder of adapters and load this page again."
        )
    gr.Markdown("Draw a map, or upload one: it says where things are, and the prompt says what they are.")
    first, drawing = (_sample(worker, offered[0]) if offered else None) or (
        Settings(prompt="an image", width=worker.side, height=worker.side),
        None,
    )
    side = 8 * worker.side if worker.side <= 64 else worker.side
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown(offered, value=offered[0] if offered else None, label="Control adapter")
            prompt = gr.Textbox(label="Prompt", value=first.prompt, max_length=LONGEST_PROMPT, elem_id="map-prompt")
            drawn = gr.ImageEditor(
                value=drawing,
                label="Map",
                type="pil",
                image_mode="RGBA",
                sources=["upload"],
                brush=gr.Brush(default_size=side // 16, colors=_colours(drawing)) if drawing else None,
                canvas_size=(side, side),
                format="png",
                layers=False,
                elem_id="map",
            )
            again = gr.Button("The adapter's sample map", size="sm", elem_id="sample-map")
            start_strength = first.adapters[0][1] if first.adapters else 1.0
            strength = gr.Slider(0, HIGHEST_STRENGTH, value=start_strength, step=0.05, label="Strength")
            gr.HTML(note(STRENGTH_NOTE))
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate-map")
                stop = gr.Button("Cancel", elem_id="cancel-map")
            with gr.Accordion("More settings", open=False):
                seed = gr.Number(label="Seed", value=first.seed, precision=0, minimum=0, maximum=HIGHEST_SEED)
                steps = gr.Slider(1, MOST_STEPS, value=first.steps, step=1, label="Steps")
                guidance = gr.Slider(0, HIGHEST_GUIDANCE, value=first.guidance, step=0.5, label="Guidance")
                sides = size_sliders(worker, first.width, first.height)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(status("Ready."), elem_id="control-status")
            preview, gallery = image_boxes("Images: base and controlled, from the same seed", "map-gallery")
            with gr.Accordion("Use the settings and the map of an image", open=False):
                dropped = gr.File(
                    label="Drop a PNG that was generated under a map", file_types=[".png"], elem_id="map-settings"
                )

    inputs = [chosen, prompt, drawn, strength, seed, steps, guidance, *sides]

    def generate(name, prompt, drawn, strength, seed, steps, guidance, width, height, request: gr.Request):
        try:
            settings = Settings(
                prompt=prompt or "",
                adapters=((str(name or ""), strength),),
                steps=whole("Steps", steps),
                guidance=guidance,
                width=whole("Width", width),
                height=whole("Height", height),
                seed=whole("Seed", seed),
            )
            control = _map_of(drawn)
        except InputError as error:
            yield problem(str(error)), None, gr.skip()
            raise gr.Error(str(error), print_exception=False) from None
        yield from paint(worker, results, settings, str(request.session_hash), control)

    go.click(
        generate,
        inputs,
        [said, preview, gallery],
        api_name="control",
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
    )

    def cancel(request: gr.Request) -> None:
        worker.cancel(str(request.session_hash))

    stop.click(cancel, api_name=False, queue=False, show_progress="hidden")

    def start(name: str | None) -> list[Any]:
        found = _sample(worker, str(name or ""))
        if found is None:
            return [*[gr.skip()] * len(inputs), problem(f"{name or 'This adapter'} comes with no sample map")]
        return [gr.skip(), *_values(*found)[1:], status("This is the map of the adapter's image.")]

    again.click(start, chosen, [*inputs, said], api_name="sample_map", show_progress="hidden")

    def restore(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * (len(inputs) + 1)
        try:
            found, control = _read(path)
            worker.library.get(found.adapters[0][0])
        except InputError as error:
            return [*[gr.skip()] * len(inputs), problem(str(error))]
        said = status(f"These are the settings and the map of {Path(path).name}.")
        return [*_values(found, control), said]

    dropped.upload(restore, dropped, [*inputs, said], api_name="use_map", show_progress="hidden")
    return chosen


def _sample(worker: Worker, name: str) -> tuple[Settings, Image.Image] | None:
    """What an adapter's image was generated from, where it was downloaded from this page."""
    try:
        picture = worker.library.get(name).image
        return None if picture is None else _read(picture)
    except InputError:
        return None


def _read(path: str | Path) -> tuple[Settings, Image.Image]:
    """Settings and map of an image from this tab.

    Raises:
        InputError: it is none.
    """
    settings, control = read_image(path)
    if control is None or len(settings.adapters) != 1:
        raise InputError(f"{Path(path).name}: was generated without a map; drop it in the tab Generate")
    return settings, control


def _values(settings: Settings, control: Image.Image) -> list[Any]:
    """Of the tab's inputs."""
    ((name, strength),) = settings.adapters
    about = [settings.seed, settings.steps, settings.guidance, settings.width, settings.height]
    return [name, settings.prompt, control, strength, *about]


def _colours(control: Image.Image) -> list[str]:
    """What a map is drawn with, the most used first: the colours of one that exists."""
    counted = sorted(control.convert("RGB").getcolors(control.width * control.height), reverse=True)
    return [f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in counted[:MOST_BRUSHES]]


def _map_of(drawn: dict[str, Any] | None) -> Image.Image:
    """The image that was drawn or uploaded.

    Raises:
        InputError: nothing was, or it is too large.
    """
    image = None if drawn is None else drawn.get("composite") or drawn.get("background")
    if image is None or not np.asarray(image.convert("RGBA"))[..., 3].any():
        raise InputError("Map: is empty; draw one, or upload an image")
    if max(image.size) > LARGEST_MAP:
        raise InputError(f"Map: has {image.width}×{image.height} pixels; {LARGEST_MAP} a side at most fit")
    return image
