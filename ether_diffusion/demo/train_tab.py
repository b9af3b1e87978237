"""The tab that trains an adapter from a few photographs."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd

from ether_diffusion.base_models import miniature_name
from ether_diffusion.demo.board import Board
from ether_diffusion.demo.markup import problem, progress, status
from ether_diffusion.demo.panels import JobPanel, Update, Work
from ether_diffusion.demo.photo_picker import PhotoPicker
from ether_diffusion.demo.recipe_panel import RecipePanel
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.demo.training import (
    FEWEST_PHOTOS,
    FEWEST_STEPS,
    MOST_PHOTOS,
    MOST_STEPS,
    STEPS,
    TOKEN,
    Choices,
    Progress,
    Trainer,
)
from ether_diffusion.errors import InputError
from ether_diffusion.training.options import DEFAULT_METHOD

METHODS = [("ETHER+ (the default)", "ether_plus"), ("ETHER (a quarter of the size)", "ether")]
INTRODUCTION = f"{FEWEST_PHOTOS} to {MOST_PHOTOS} photos of a subject, and a word for it."
SMOOTHING = 0.9
"""Share of the smoothed loss that stays at each step."""
OPEN_GENERATE = "() => window.etherOpen('Generate')"


class TrainTab:
    """Built where it is made, within a `gr.Tab`.

    Attributes:
        trained: the event that a training has ended.
        use: the button that goes on with the adapter in another tab; `used` gives its name and prompt.
    """

    def __init__(self, board: Board, trainer: Trainer, results: Results):
        self.trainer = trainer
        self.panel = JobPanel(board, "trainings", "train")
        with gr.Row(elem_classes="ether-tab"):
            with gr.Column(elem_classes="ether-controls"):
                gr.Markdown(INTRODUCTION)
                self.photos = PhotoPicker(results, is_miniature=miniature_name(trainer.worker.base) is not None)
                self.name = gr.Textbox(label="Name of the adapter", max_length=40, placeholder="my-dog")
                self.word = gr.Textbox(label="What the photos show", max_length=30, placeholder="dog")
                self.photos.connect(self.name, self.word)
                with gr.Column(elem_classes="ether-go"):
                    self.panel.start_button("Train")
                with gr.Column(elem_classes="ether-more"):
                    with gr.Accordion("More", open=False):
                        self.method = gr.Radio(METHODS, value=DEFAULT_METHOD, label="Method")
                        self.steps = gr.Slider(FEWEST_STEPS, MOST_STEPS, STEPS, step=1, label="Steps")
                        self.rate = gr.Number(
                            label="Learning rate", value=None, placeholder="the method's own", minimum=0, maximum=1
                        )
            with gr.Column(elem_classes="ether-results"):
                self.panel.place_status()
                with gr.Row(visible=False, elem_id="trained") as self.finished:
                    self.use = gr.Button("Use it now", variant="primary", elem_id="use-now")
                    self.keep = gr.Radio([], label="Keep it as it was after step", elem_id="keep-step")
                self.name_trained = gr.State("")
                self.losses = gr.LinePlot(
                    x="step", y="loss", color="curve", x_title="Step", y_title="Loss", height=220, visible=False
                )
                self.samples = gr.Image(
                    label="Samples: base above, adapted below",
                    visible=False,
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="samples",
                    elem_classes="ether-samples",
                )
                with gr.Column(elem_classes="ether-last"):
                    RecipePanel()
        self._connect()

    def _connect(self) -> None:
        self.trained = self.panel.connect(
            [self.panel.go.click],
            self.train,
            [self.photos.gallery, self.name, self.word, self.photos.captions, self.method, self.steps, self.rate],
            self.show,
            [self.losses, self.samples, self.finished, self.keep, self.name_trained],
            api_name="train",
        )
        self.keep.input(
            self.keep_step,
            [self.name_trained, self.keep],
            [self.panel.status, self.samples],
            api_name="keep_step",
            show_progress="hidden",
        )

    def train(
        self, photos, name, word, captions=None, method=DEFAULT_METHOD, steps=STEPS, rate=None, *, owner: str
    ) -> tuple[Work, Update]:
        choices = Choices(
            photos=self.photos.chosen(photos),
            captions=(captions or "").split("\n"),
            name=name,
            word=word,
            method=method,
            steps=int(steps) if float(steps).is_integer() else steps,
            learning_rate=rate or None,
        )
        hidden = gr.update(visible=False)
        return self.trainer.train(choices, owner), {
            self.losses: hidden,
            self.samples: hidden,
            self.finished: hidden,
        }

    def show(self, now: Progress) -> Update:
        losses = _curves(now.losses)
        update: dict[Any, Any] = {
            self.panel.status: _words(now),
            self.losses: gr.LinePlot(losses, x_lim=[1, now.steps], visible=bool(now.losses)),
            self.samples: gr.skip() if now.image is None else gr.update(value=now.image, visible=True),
        }
        if now.name is not None:
            steps = sorted(now.sheets)
            update |= {
                self.finished: gr.update(visible=True),
                self.keep: gr.update(choices=[(f"{step:,}", step) for step in steps], value=steps[-1]),
                self.name_trained: now.name,
            }
        return update

    def keep_step(self, name: str, step: int | None, request: gr.Request) -> Update:
        """Make the adapter what it was after a step of which there are samples."""
        try:
            sheet = self.trainer.keep(str(name), int(step or 0), owner_of(request))
        except (InputError, OSError) as error:
            return {self.panel.status: problem(str(error))}
        return {self.panel.status: status(f"{name} is what it was after step {step:,}."), self.samples: sheet}

    def used(self, name: str) -> tuple[str, str]:
        """The adapter that was trained, and the prompt that it knows."""
        return name, self.trainer.worker.library.get(name).prompt or f"a photo of {TOKEN}"


def _curves(losses: tuple[float, ...]) -> pd.DataFrame:
    """The loss of each step, and smoothed: an exponential average that does not lean on its start."""
    average, smoothed = 0.0, []
    for k, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**k))
    count = len(losses)
    return pd.DataFrame(
        {
            "step": [*range(1, count + 1)] * 2,
            "loss": [*losses, *smoothed],
            "curve": ["each step"] * count + ["smoothed"] * count,
        }
    )


def _words(now: Progress) -> str:
    if now.name is not None:
        return status(f"Done: the adapter {now.name} is in the list.")
    if not now.losses:
        return status("Loading the base model and generating its samples …")
    step = len(now.losses)
    text = f"Step {step} of {now.steps}, about {now.left} left; loss {now.losses[-1]:.4f}"
    return progress(text, step / now.steps)
