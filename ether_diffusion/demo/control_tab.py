"""The tab that generates under the control of a map, with a light-control adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ether_diffusion.demo.board import Board
from ether_diffusion.demo.markup import STRENGTH_NOTE, problem, status, tooltip
from ether_diffusion.demo.panels import ImagePanel, Update, Work, sampling_sliders
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_SEED,
    HIGHEST_STRENGTH,
    LARGEST_MAP,
    LONGEST_PROMPT,
    Settings,
    read_image,
)
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

MOST_BRUSHES = 12
NO_ADAPTER = (
    "There is no control adapter in the folder. `train_controlnet_ether.py` trains one; put its output folder into "
    "the folder of adapters and load this page again."
)


class ControlTab:
    """Built where it is made, within a `gr.Tab`; it starts with what the first adapter's image was generated from."""

    def __init__(self, board: Board, worker: Worker, results: Results):
        self.worker = worker
        self.panel = ImagePanel(board, worker, results, "control")
        offered = worker.usable(control=True)
        if not offered:
            gr.Markdown(NO_ADAPTER)
        gr.Markdown("Draw a map, or upload one: it says where things are, and the prompt says what they are.")
        start, drawing = (self._sample(offered[0]) if offered else None) or (
            worker.start(),
            None,
        )
        strength = start.adapters[0][1] if start.adapters else 1.0
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.adapter = gr.Dropdown(offered, value=next(iter(offered), None), label="Control adapter")
                self.prompt = gr.Textbox(
                    label="Prompt", value=start.prompt, max_length=LONGEST_PROMPT, elem_id="map-prompt"
                )
                self.map = _map_editor(worker.side, drawing)
                self.again = gr.Button("The adapter's sample map", size="sm", elem_id="sample-map")
                self.strength = gr.Slider(0, HIGHEST_STRENGTH, value=strength, step=0.05, label="Strength")
                gr.HTML(tooltip("What do strengths mean?", STRENGTH_NOTE))
                go = self.panel.start_button("Generate")
                with gr.Accordion("More settings", open=False):
                    seeds = {"precision": 0, "minimum": 0, "maximum": HIGHEST_SEED}
                    self.seed = gr.Number(label="Seed", value=start.seed, **seeds)
                    self.sampling = sampling_sliders(worker, start)
            with gr.Column(scale=3, min_width=300):
                self.panel.place_results("Images: base and controlled, from the same seed")
                with gr.Accordion("Use the settings and the map of an image", open=False):
                    self.dropped = gr.File(
                        label="Drop a PNG that was generated under a map", file_types=[".png"], elem_id="map-settings"
                    )
        self._connect(go)

    def _connect(self, go: gr.Button) -> None:
        # The order in which clients of the API give them, too.
        inputs = [self.adapter, self.prompt, self.map, self.strength, self.seed, *self.sampling]
        outputs = [*inputs, self.panel.status]
        self.panel.connect(
            [go.click], self.generate, inputs, self.panel.show, self.panel.outputs, api_name="control"
        )
        self.again.click(self.show_sample, self.adapter, outputs, api_name="sample_map", show_progress="hidden")
        self.dropped.upload(self.restore, self.dropped, outputs, api_name="use_map", show_progress="hidden")

    def generate(
        self, name, prompt, drawn, strength, seed, steps, guidance, width, height, *, owner: str
    ) -> tuple[Work, Update]:
        settings = Settings(
            prompt=prompt or "",
            adapters=((str(name or ""), strength),),
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            seed=seed,
        )
        return self.panel.generate(settings, owner, _map_of(drawn))

    def show_sample(self, name: str | None) -> Update:
        """What the chosen adapter's image was generated from."""
        found = self._sample(str(name or ""))
        if found is None:
            return {self.panel.status: problem(f"{name or 'This adapter'} comes with no sample map")}
        update = self._values(*found)
        del update[self.adapter]
        return update | {self.panel.status: status("This is the map of the adapter's image.")}

    def restore(self, path: str | None) -> Update:
        """The settings and the map of an image that was downloaded from this tab."""
        if path is None:
            return {self.panel.status: gr.skip()}
        try:
            found, control = _read(path)
            self.worker.library.get(found.adapters[0][0])
        except InputError as error:
            return {self.panel.status: problem(str(error))}
        told = status(f"These are the settings and the map of {Path(path).name}.")
        return self._values(found, control) | {self.panel.status: told}

    def _sample(self, name: str) -> tuple[Settings, Image.Image] | None:
        """What an adapter's image was generated from, where it was downloaded from this page."""
        try:
            image = self.worker.library.get(name).image
            return None if image is None else _read(image)
        except InputError:
            return None

    def _values(self, settings: Settings, control: Image.Image) -> Update:
        ((name, strength),) = settings.adapters
        sampling = (settings.steps, settings.guidance, settings.width, settings.height)
        return {
            self.adapter: name,
            self.prompt: settings.prompt,
            self.map: control,
            self.strength: strength,
            self.seed: settings.seed,
            **dict(zip(self.sampling, sampling, strict=True)),
        }


def _map_editor(side: int, drawing: Image.Image | None) -> gr.ImageEditor:
    """Where a map is drawn: it starts with one, and the brush has its colours."""
    side = 8 * side if side <= 64 else side  # a person cannot draw on 64 pixels
    return gr.ImageEditor(
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


def _read(path: str | Path) -> tuple[Settings, Image.Image]:
    """Settings and map of an image from this tab.

    Raises:
        InputError: it is none.
    """
    settings, control = read_image(path)
    if control is None or len(settings.adapters) != 1:
        raise InputError(f"{Path(path).name}: was generated without a map; drop it in the tab Generate")
    return settings, control


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
