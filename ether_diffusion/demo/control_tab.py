"""The tab that generates under the control of a map, with a light-control adapter."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.demo import maps
from ether_diffusion.demo.board import Board
from ether_diffusion.demo.generate_tab import RANDOM_SEEDS
from ether_diffusion.demo.markup import STRENGTH_NOTE, problem, status, tooltip
from ether_diffusion.demo.panels import ImagePanel, Update, Work, sampling_sliders
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_SEED,
    HIGHEST_STRENGTH,
    LONGEST_PROMPT,
    MOST_IMAGES,
    Settings,
    read_image,
)
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

NO_ADAPTER = (
    "There is no control adapter in the folder. `train_controlnet_ether.py` trains one; put its output folder into "
    "the folder of adapters and load this page again."
)


class ControlTab:
    """Built where it is made, within a `gr.Tab`; it starts with what the first adapter's image was generated from."""

    def __init__(self, board: Board, worker: Worker, results: Results):
        self.worker = worker
        self.panel = ImagePanel(board, worker, results, "control")
        self.offered = worker.usable(control=True)
        name = next(iter(self.offered), None)
        found = None if name is None else self._sample(name)
        start, drawing = found or (worker.start(), None)
        self.side = 8 * worker.side if worker.side <= 64 else worker.side  # a person cannot draw on 64 pixels
        with gr.Row(elem_classes="ether-tab"):
            with gr.Column(elem_classes="ether-controls"):
                if name is None:
                    gr.Markdown(NO_ADAPTER)
                self.adapter = gr.Dropdown(
                    self.offered, value=name, label="Control adapter", elem_id="control-adapter"
                )
                self.prompt = gr.Textbox(
                    label="Prompt", value=start.prompt, max_length=LONGEST_PROMPT, lines=2, elem_id="map-prompt"
                )
                self._place_map(self._classes(name), drawing)
                with gr.Column(elem_classes="ether-go"):
                    go = self.panel.start_button("Generate")
                with gr.Column(elem_classes="ether-more"):
                    self._place_numbers(start)
            with gr.Column(elem_classes="ether-results"):
                self.panel.place_results("Images")
                self.shown_map = gr.Image(
                    label="The map",
                    visible=False,
                    interactive=False,
                    buttons=[],
                    height=220,
                    format="png",
                    elem_id="shown-map",
                    elem_classes="ether-images",
                )
                with gr.Column(elem_classes="ether-last"):
                    with gr.Accordion("Use the settings and the map of an image", open=False):
                        self.dropped = gr.File(
                            label="Drop a PNG that was generated under a map",
                            file_types=[".png"],
                            elem_id="map-settings",
                        )
        self._connect(go)

    def _place_map(self, classes: dict[str, str], drawing: Image.Image | None) -> None:
        """Where a map is drawn: it starts with one, its brush has the colours of the classes."""
        colours = list(classes.values())
        self.map = gr.ImageEditor(
            value=drawing or maps.canvas(self.side, maps.background_of(classes)),
            label="Map",
            type="pil",
            image_mode="RGBA",
            sources=["upload"],
            brush=_brush(self.side, colours),
            canvas_size=(self.side, self.side),
            format="png",
            layers=False,
            elem_id="map",
        )
        self.legend = gr.HTML(maps.legend(classes), elem_id="legend")
        with gr.Row():
            self.colour = gr.Dropdown(
                _named(classes), value=next(iter(colours), None), label="Ground", min_width=100, elem_id="ground"
            )
            self.fill = gr.Button("Fill the ground", size="sm", min_width=100, elem_id="fill-map")
        with gr.Row():
            self.again = gr.Button("Sample map", size="sm", min_width=100, elem_id="sample-map")
            self.empty = gr.Button("Empty map", size="sm", min_width=100, elem_id="empty-map")

    def _place_numbers(self, start: Settings) -> None:
        """Strength, seeds and how many images; the rest is folded."""
        strength = start.adapters[0][1] if start.adapters else 1.0
        self.strength = gr.Slider(0, HIGHEST_STRENGTH, value=strength, step=0.05, label="Strength")
        gr.HTML(tooltip("What do strengths mean?", STRENGTH_NOTE))
        with gr.Row():
            seeds = {"precision": 0, "minimum": 0, "maximum": HIGHEST_SEED, "min_width": 100}
            self.seed = gr.Number(label="Seed", value=start.seed, elem_id="map-seed", **seeds)
            self.images = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Images", min_width=100)
        self.draw = gr.Checkbox(label="New seed every time", value=False)
        with gr.Accordion("More settings", open=False):
            self.sampling = sampling_sliders(self.worker, start)

    def _connect(self, go: gr.Button) -> None:
        # The order in which clients of the API give them, too.
        inputs = [self.adapter, self.prompt, self.map, self.strength, self.seed, *self.sampling]
        drawn = [self.map, self.legend, self.colour]
        quiet = {"show_progress": "hidden"}
        self.panel.connect(
            [go.click],
            self.generate,
            [*inputs, self.draw, self.images],
            self._show,
            [*self.panel.outputs, self.shown_map, self.seed],
            api_name="control",
        )
        self.adapter.input(self.choose, self.adapter, drawn, api_name=False, **quiet)
        self.again.click(self.show_sample, self.adapter, [*inputs, self.panel.status], api_name="sample_map", **quiet)
        for event in (self.empty.click, self.map.clear):
            event(self.clear, self.adapter, self.map, api_name=False, **quiet)
        self.fill.click(
            self.fill_ground,
            [self.map, self.colour, self.adapter],
            [self.map, self.panel.status],
            api_name="fill_map",
            **quiet,
        )
        self.dropped.upload(self.restore, self.dropped, [*inputs, self.panel.status], api_name="use_map", **quiet)

    # Maps -------------------------------------------------------------------------------------------------------

    def choose(self, name: str | None) -> Update:
        """The palette of another adapter; what is drawn stays."""
        classes = self._classes(name)
        colours = list(classes.values())
        return {
            self.map: gr.update(brush=_brush(self.side, colours)),
            self.legend: maps.legend(classes),
            self.colour: gr.update(choices=_named(classes), value=next(iter(colours), None)),
        }

    def clear(self, name: str | None) -> Image.Image:
        """A map with nothing on it, in the colour that maps of this adapter have there."""
        return maps.canvas(self.side, maps.background_of(self._classes(name)))

    def fill_ground(self, drawn: dict[str, Any] | None, colour: str | None, name: str | None) -> Update:
        try:
            background = maps.background_of(self._classes(name))
            return {self.map: maps.fill(drawn, colour or background, background), self.panel.status: gr.skip()}
        except InputError as error:
            return {self.panel.status: problem(str(error))}

    def _classes(self, name: str | None) -> dict[str, str]:
        if not name:
            return {}
        try:
            adapter = self.worker.library.get(name)
        except InputError:
            return {}
        found = self._sample(name)
        return maps.classes_of(adapter, None if found is None else found[1])

    # Images -----------------------------------------------------------------------------------------------------

    def generate(
        self, name, prompt, drawn, strength, seed, steps, guidance, width, height, draw=False, images=1, *, owner: str
    ) -> tuple[Work, Update]:
        settings = Settings(
            prompt=prompt or "",
            adapters=((str(name or ""), strength),),
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            seed=secrets.randbelow(RANDOM_SEEDS) if draw else seed,
            images=images,
        )
        control = maps.map_of(drawn, maps.background_of(self._classes(name)))
        work, empty = self.panel.generate(settings, owner, control)
        return work, empty | {self.seed: settings.seed, self.shown_map: gr.update(value=control, visible=True)}

    def _show(self, news: Any) -> Update:
        update = self.panel.show(news)
        if (control := getattr(news, "control", None)) is not None:
            update[self.shown_map] = gr.update(value=control, visible=True)
        return update

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


def _brush(side: int, colours: list[str]) -> gr.Brush:
    return gr.Brush(default_size=side // 16, colors=colours or ["#ffffff"], default_color=(colours or ["#ffffff"])[-1])


def _named(classes: dict[str, str]) -> list[tuple[str, str]]:
    return list(classes.items())


def _read(path: str | Path) -> tuple[Settings, Image.Image]:
    """Settings and map of an image from this tab.

    Raises:
        InputError: it is none.
    """
    settings, control = read_image(path)
    if control is None or len(settings.adapters) != 1:
        raise InputError(f"{Path(path).name}: was generated without a map; drop it in the tab Generate")
    return settings, control
