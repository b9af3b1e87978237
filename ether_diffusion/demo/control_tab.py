"""The tab that paints under the control of a map, with a light-control adapter."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..training.command_line import InputError
from .generate_tab import choices, paint, whole
from .results import Results
from .settings import HIGHEST_GUIDANCE, HIGHEST_SEED, HIGHEST_STRENGTH, LONGEST_PROMPT, MOST_STEPS, Settings
from .words import STRENGTH_NOTE, note, problem, status
from .worker import Worker

LARGEST_MAP = 4096


def control_tab(worker: Worker, results: Results) -> gr.Dropdown:
    """Build the tab; its list of adapters."""
    offered = choices(worker, control=True)
    if not offered:
        gr.Markdown(
            "There is no control adapter in the folder. `train_controlnet_ether.py` trains one; put its output folder "
            "into the folder of adapters and load this page again."
        )
    side = 8 * worker.side if worker.side <= 64 else worker.side
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown(offered, value=offered[0] if offered else None, label="Control adapter")
            prompt = gr.Textbox(label="Prompt", max_length=LONGEST_PROMPT)
            drawn = gr.ImageEditor(
                label="Map: draw it, or upload one",
                type="pil",
                image_mode="RGBA",
                sources=["upload"],
                canvas_size=(side, side),
                format="png",
                layers=False,
                elem_id="map",
            )
            strength = gr.Slider(0, HIGHEST_STRENGTH, value=1.0, step=0.05, label="Strength")
            gr.HTML(note(STRENGTH_NOTE))
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=HIGHEST_SEED)
            steps = gr.Slider(1, MOST_STEPS, value=25, step=1, label="Steps")
            guidance = gr.Slider(0, HIGHEST_GUIDANCE, value=5.0, step=0.5, label="Guidance")
            with gr.Row():
                go = gr.Button("Generate", variant="primary")
                stop = gr.Button("Cancel")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(status("Ready."), elem_id="control-status")
            preview = gr.Image(
                label="Preview", height=200, interactive=False, buttons=[], format="png", elem_classes="ether-preview"
            )
            gallery = gr.Gallery(
                label="Pictures: base and controlled, from the same seed",
                columns=2,
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
            )

    def generate(name, prompt, drawn, strength, seed, steps, guidance, request: gr.Request):
        try:
            settings = Settings(
                prompt=prompt or "",
                adapters=((str(name or ""), strength),),
                steps=whole("Steps", steps),
                guidance=guidance,
                width=worker.side,
                height=worker.side,
                seed=whole("Seed", seed),
            )
            control = _map_of(drawn)
        except InputError as error:
            yield problem(str(error)), None, gr.skip()
            raise gr.Error(str(error), print_exception=False) from None
        yield from paint(worker, results, settings, str(request.session_hash), control)

    go.click(
        generate,
        [chosen, prompt, drawn, strength, seed, steps, guidance],
        [said, preview, gallery],
        api_name="control",
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
    )

    def cancel(request: gr.Request) -> None:
        worker.cancel(str(request.session_hash))

    stop.click(cancel, api_name=False, queue=False, show_progress="hidden")
    return chosen


def _map_of(drawn: dict[str, Any] | None) -> Image.Image:
    """The picture that was drawn or uploaded.

    Raises:
        InputError: nothing was, or it is too large.
    """
    image = None if drawn is None else drawn.get("composite") or drawn.get("background")
    if image is None or not np.asarray(image.convert("RGBA"))[..., 3].any():
        raise InputError("Map: is empty; draw one, or upload a picture")
    if max(image.size) > LARGEST_MAP:
        raise InputError(f"Map: has {image.width}×{image.height} pixels; {LARGEST_MAP} a side at most fit")
    return image
