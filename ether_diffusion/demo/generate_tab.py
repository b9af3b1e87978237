"""The tab that generates: base and adapted model side by side, from the same seed."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.demo.adapter_picker import AdapterPicker
from ether_diffusion.demo.board import Board
from ether_diffusion.demo.history import History
from ether_diffusion.demo.markup import problem, status
from ether_diffusion.demo.panels import ImagePanel, Update, Work, sampling_sliders
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_SEED,
    LONGEST_PROMPT,
    MOST_ADAPTERS,
    MOST_IMAGES,
    Settings,
    read_image,
)
from ether_diffusion.demo.start import Start, read_start
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

RANDOM_SEEDS = 10**6
"""A seed that is drawn stays below this: short enough to be told to somebody."""
SIDE_BY_SIDE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Strengths of a grid."""


class GenerateTab:
    """Built where it is made, within a `gr.Tab`."""

    def __init__(self, board: Board, worker: Worker, results: Results):
        self.worker = worker
        self.panel = ImagePanel(board, worker, results, "generate")
        offered = worker.usable()
        with gr.Row(elem_classes="ether-tab"):
            with gr.Column(elem_classes="ether-controls"):
                self.picker = AdapterPicker(worker)
                first = worker.library.get(offered[-1]).prompt if offered else ""
                self.prompt = gr.Textbox(
                    label="Prompt", value=first, max_length=LONGEST_PROMPT, lines=2, elem_id="prompt"
                )
                with gr.Column(elem_classes="ether-go"):
                    go = self.panel.start_button("Generate")
                with gr.Column(elem_classes="ether-more"):
                    self._place_numbers()
                    self._place_start()
                    with gr.Accordion("More settings", open=False):
                        self.negative = gr.Textbox(
                            label="Negative prompt",
                            max_length=LONGEST_PROMPT,
                            visible=worker.takes("negative_prompt"),
                        )
                        self.sampling = sampling_sliders(worker, worker.start())
            with gr.Column(elem_classes="ether-results"):
                self.panel.place_results("Images", compared=True)
                with gr.Column(elem_classes="ether-last"):
                    self.history = History(results, "history")
                    with gr.Accordion("Use the settings of an image", open=False):
                        self.dropped = gr.File(
                            label="Drop a PNG that was downloaded here", file_types=[".png"], elem_id="settings-of"
                        )
        self._connect(go)

    def _place_numbers(self) -> None:
        """Seeds, and how many images of which strengths."""
        with gr.Row():
            self.seed = gr.Number(
                label="Seed", value=0, min_width=100, precision=0, minimum=0, maximum=HIGHEST_SEED, elem_id="seed"
            )
            self.images = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Images", min_width=100)
        self.draw = gr.Checkbox(label="New seed every time", value=False)
        self.grid = gr.Checkbox(
            label="Strengths side by side",
            info=f"The first adapter at {', '.join(f'{each:g}' for each in SIDE_BY_SIDE)}, in one batch",
            value=False,
            elem_id="grid",
        )

    def _place_start(self) -> None:
        """An image to start from, where the base model can."""
        possible = self.worker.starts_from_images()
        label = "Start from an image" + (
            "; paint what is made anew" if self.worker.starts_from_images("inpainting") else ""
        )
        with gr.Accordion("Start from an image", open=False, visible=possible, elem_id="start"):
            self.start = gr.ImageEditor(
                label=label,
                type="pil",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                transforms=("crop",),
                layers=False,
                format="png",
                height=320,
                elem_id="start-image",
            )
            self.change = gr.Slider(0.05, 1, value=0.6, step=0.05, label="Change", info="1 forgets the image")

    def _connect(self, go: gr.Button) -> None:
        # The order in which clients of the API give them, too.
        inputs = [self.picker.names, *self.picker.strengths, self.prompt, self.negative, *self.sampling]
        inputs += [self.draw, self.seed, self.images, self.grid, self.start, self.change]
        done = self.panel.connect(
            [go.click, self.prompt.submit],
            self.generate,
            inputs,
            self.panel.show,
            [*self.panel.outputs, self.seed],
            api_name="generate",
        )
        self.history.connect(done)
        self.picker.connect(self.prompt)
        restored = [each for each in inputs if each not in (self.start, self.change)]
        self.dropped.upload(
            self.restore,
            self.dropped,
            [*restored, self.panel.status],
            api_name="use_settings",
            show_progress="hidden",
        )

    def generate(
        self, adapters, s1, s2, s3, prompt, negative, steps, guidance, width, height, draw, seed, images, grid=False,
        drawn: dict[str, Any] | None = None, change: float = 0.6, *, owner: str,
    ) -> tuple[Work, Update]:  # fmt: skip
        start: Start | None = read_start(drawn, change)
        settings = Settings(
            prompt=prompt or "",
            negative_prompt=negative or "",
            adapters=tuple(zip(adapters or (), (s1, s2, s3), strict=False)),
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            seed=secrets.randbelow(RANDOM_SEEDS) if draw else seed,
            images=images,
            strengths=SIDE_BY_SIDE if grid else (),
            change=0.0 if start is None else change,
        )
        work, empty = self.panel.generate(settings, owner, start=start)
        return work, empty | {self.seed: settings.seed}

    def restore(self, path: str | None) -> Update:
        """The settings of an image that was downloaded here."""
        if path is None:
            return {self.panel.status: gr.skip()}
        try:
            found, control = read_image(path)
            if control is not None:
                raise InputError(f"{Path(path).name}: was generated under a map; drop it in the tab Control")
            for name, _ in found.adapters:
                self.worker.library.get(name)
        except InputError as error:
            return {self.panel.status: problem(str(error))}
        names, strengths = [name for name, _ in found.adapters], [strength for _, strength in found.adapters]
        strengths += [1.0] * (MOST_ADAPTERS - len(strengths))
        sampling = (found.steps, found.guidance, found.width, found.height)
        told = f"These are the settings of {Path(path).name}."
        if found.change:
            told += f" It was started from an image, of which {found.change:g} was changed: put that in again."
        return {
            self.picker.names: gr.update(choices=self.worker.usable(), value=names),
            **dict(zip(self.picker.strengths, strengths, strict=True)),
            **dict(zip(self.sampling, sampling, strict=True)),
            self.prompt: found.prompt,
            self.negative: found.negative_prompt,
            self.draw: False,
            self.seed: found.seed,
            self.images: found.images,
            self.grid: bool(found.strengths),
            self.panel.status: status(told),
        }
