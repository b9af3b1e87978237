"""The tab that generates: base and adapted model side by side, from the same seed."""

from __future__ import annotations

import secrets
from pathlib import Path

import gradio as gr

from ether_diffusion.demo.board import Board
from ether_diffusion.demo.markup import STRENGTH_NOTE, cards, note, problem, status
from ether_diffusion.demo.panels import ImagePanel, Update, Work, sampling_sliders
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_SEED,
    HIGHEST_STRENGTH,
    LONGEST_PROMPT,
    MOST_ADAPTERS,
    MOST_IMAGES,
    Settings,
    read_image,
)
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

RANDOM_SEEDS = 10**6
"""A seed that is drawn stays below this: short enough to be told to somebody."""


class GenerateTab:
    """Built where it is made, within a `gr.Tab`."""

    def __init__(self, board: Board, worker: Worker, results: Results):
        self.worker = worker
        self.panel = ImagePanel(board, worker, results, "generate")
        offered = worker.usable()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                first_prompt = worker.library.get(offered[-1]).prompt if offered else ""
                self.prompt = gr.Textbox(label="Prompt", value=first_prompt, max_length=LONGEST_PROMPT, autofocus=True)
                self._choose_adapters(offered)
                go = self.panel.start_button("Generate")
                with gr.Row():
                    seeds = {"precision": 0, "minimum": 0, "maximum": HIGHEST_SEED}
                    self.seed = gr.Number(label="Seed", value=0, min_width=120, **seeds)
                    self.draw = gr.Checkbox(label="New seed every time", value=False, min_width=120)
                self.images = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Number of images")
                with gr.Accordion("More settings", open=False):
                    has_negative = worker.takes("negative_prompt")
                    self.negative = gr.Textbox(
                        label="Negative prompt", max_length=LONGEST_PROMPT, visible=has_negative
                    )
                    start = worker.start()
                    self.sampling = sampling_sliders(worker, start)
            with gr.Column(scale=3, min_width=300):
                self.panel.place_results("Images: base and adapted, from the same seed")
                with gr.Accordion("Use the settings of an image", open=False):
                    self.dropped = gr.File(label="Drop a PNG that was downloaded here", file_types=[".png"])
        with gr.Accordion("Adapters on offer", open=True):
            self.listing = gr.HTML(self.list_adapters(), elem_id="listing")
        self._connect(go)

    def _choose_adapters(self, offered: list[str]) -> None:
        self.adapters = gr.Dropdown(
            offered,
            value=offered[-1:],
            multiselect=True,
            max_choices=MOST_ADAPTERS,
            label="Adapters",
            info=f"Up to {MOST_ADAPTERS}, applied in this order. None generates with the base model alone.",
            elem_id="adapters",
        )
        self.strengths = [
            gr.Slider(0, HIGHEST_STRENGTH, value=1.0, step=0.05, **shown) for shown in _strength_labels(offered[-1:])
        ]
        gr.HTML(note(STRENGTH_NOTE))

    def _connect(self, go: gr.Button) -> None:
        # The order in which clients of the API give them, too.
        inputs = [self.adapters, *self.strengths, self.prompt, self.negative, *self.sampling]
        inputs += [self.draw, self.seed, self.images]
        self.panel.connect(
            [go.click, self.prompt.submit],
            self.generate,
            inputs,
            self.panel.show,
            [*self.panel.outputs, self.seed],
            api_name="generate",
        )
        self.adapters.change(
            lambda names: [gr.update(**shown) for shown in _strength_labels(names or [])],
            self.adapters,
            self.strengths,
            api_name=False,
            queue=False,
            show_progress="hidden",
        )
        self.dropped.upload(
            self.restore,
            self.dropped,
            [*inputs, self.panel.status],
            api_name="use_settings",
            show_progress="hidden",
        )

    def list_adapters(self) -> str:
        return cards((each, self.worker.fit(each)) for each in self.worker.library.adapters())

    def generate(
        self, adapters, s1, s2, s3, prompt, negative, steps, guidance, width, height, draw, seed, images, *, owner: str
    ) -> tuple[Work, Update]:
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
        )
        work, empty = self.panel.generate(settings, owner)
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
        return {
            self.adapters: gr.update(choices=self.worker.usable(), value=names),
            **dict(zip(self.strengths, strengths, strict=True)),
            **dict(zip(self.sampling, sampling, strict=True)),
            self.prompt: found.prompt,
            self.negative: found.negative_prompt,
            self.draw: False,
            self.seed: found.seed,
            self.images: found.images,
            self.panel.status: status(f"These are the settings of {Path(path).name}."),
        }


def _strength_labels(names: list[str]) -> list[dict]:
    """Properties of all the sliders of strengths: those of adapters that are chosen are shown, with their names."""
    shown = [{"visible": True, "label": f"Strength of {name}"} for name in names]
    hidden = [{"visible": False, "label": f"Strength {k + 1}"} for k in range(MOST_ADAPTERS)]
    return shown + hidden[len(shown) :]
