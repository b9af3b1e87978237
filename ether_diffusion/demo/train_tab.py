"""The tab that trains an adapter from a few photographs."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pandas as pd
from PIL import Image

from ether_diffusion.demo.board import Board
from ether_diffusion.demo.markup import problem, progress, status
from ether_diffusion.demo.panels import JobPanel, Update, Work
from ether_diffusion.demo.photos import LARGEST_SQUARE, cut_square, read_photo
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.demo.training import FEWEST_PHOTOS, MOST_PHOTOS, TOKEN, Progress, Trainer
from ether_diffusion.errors import InputError
from ether_diffusion.training.options import DEFAULT_METHOD

LARGEST_CUT = 1024
THUMBNAIL = 512
READY = status("Ready.")
METHODS = [("ETHER+ (moves both sides, the default)", "ether_plus"), ("ETHER (a quarter of the size)", "ether")]
INTRODUCTION = (
    f"Teach the base model a subject from {FEWEST_PHOTOS} to {MOST_PHOTOS} photos. Everyone who uses this server can "
    f"then use it: say *{TOKEN}* before its word, as in *a photo of {TOKEN} dog on a red background*."
)


class TrainTab:
    """Built where it is made, within a `gr.Tab`. Attribute `trained`: the event that a training has ended."""

    def __init__(self, board: Board, trainer: Trainer, results: Results):
        self.panel = JobPanel(board, "trainings", "train")
        self.trainer, self.results = trainer, results
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._choose_photos()
                self.name = gr.Textbox(label="Name of the adapter", max_length=40, placeholder="my-dog")
                self.word = gr.Textbox(label="What the photos show", max_length=30, placeholder="dog")
                self.method = gr.Radio(METHODS, value=DEFAULT_METHOD, label="Method")
                self.panel.start_button("Train")
            with gr.Column(scale=3, min_width=300):
                self.panel.place_status()
                self.losses = gr.LinePlot(x="step", y="loss", title="Loss", height=200, visible=False)
                self.samples = gr.Image(
                    label="Samples: base above, adapted below",
                    interactive=False,
                    buttons=[],
                    elem_classes="ether-samples",
                )
        self._connect_photos()
        self._connect_training()

    def _choose_photos(self) -> None:
        self.photos = gr.File(
            label=f"Photos ({FEWEST_PHOTOS} to {MOST_PHOTOS})",
            file_count="multiple",
            file_types=["image"],
            elem_id="photos",
        )
        self.shown = gr.Gallery(
            label="What was uploaded; choose one to crop it",
            columns=4,
            height=180,
            interactive=False,
            buttons=[],
            preview=False,
            allow_preview=False,
            elem_id="uploaded",
        )
        self.chosen = gr.Number(visible=False, precision=0)  # the index of the photo to crop
        self.small = gr.State()  # that photo, made small, so that the preview of the square keeps up with the sliders
        with gr.Column(visible=False, elem_id="cropping") as self.cropping:
            self.cut = gr.Image(label="The square to keep", interactive=False, buttons=[], height=260, elem_id="cut")
            self.square = [
                gr.Slider(10, 100, 100, step=1, label="Size, % of the shorter side"),
                gr.Slider(0, 100, 50, step=1, label="From left to right, %"),
                gr.Slider(0, 100, 50, step=1, label="From top to bottom, %"),
            ]
            self.keep = gr.Button("Keep this square", size="sm", elem_id="keep-cut")

    def _connect_photos(self) -> None:
        hidden = {"api_name": False, "show_progress": "hidden"}
        self.photos.change(
            self.show_photos, self.photos, [self.shown, self.panel.status, self.chosen, self.cropping], **hidden
        )
        opened = [self.small, self.cut, self.chosen, self.cropping, *self.square]
        self.shown.select(self.open_cropping, self.photos, opened, **hidden)
        gr.on(
            [slider.input for slider in self.square],
            cut_square,
            [self.small, *self.square],
            self.cut,
            trigger_mode="always_last",
            **hidden,
        )
        self.keep.click(
            self.crop,
            [self.photos, self.chosen, *self.square],
            [self.photos, self.cropping, self.panel.status],
            api_name="crop",
            show_progress="hidden",
        )

    def _connect_training(self) -> None:
        self.trained = self.panel.connect(
            [self.panel.go.click],
            self.train,
            [self.photos, self.name, self.word, self.method],
            self._show,
            [self.losses, self.samples],
            api_name="train",
        )

    def show_photos(self, paths: list[str] | None) -> Update:
        paths = paths or []
        # What was being cropped is of other photos.
        update = {self.shown: None, self.panel.status: READY, self.chosen: None, self.cropping: gr.update(visible=False)}
        if len(paths) > MOST_PHOTOS:
            message = f"Photos: got {len(paths)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}"
            return update | {self.panel.status: problem(message)}
        try:
            return update | {self.shown: [read_photo(path, THUMBNAIL) for path in paths]}
        except InputError as error:
            return update | {self.panel.status: problem(str(error))}

    def open_cropping(self, paths: list[str] | None, selected: gr.SelectData) -> Update:
        try:
            photo = _chosen_photo(paths, selected.index, THUMBNAIL)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {
            self.small: photo,
            self.cut: cut_square(photo),
            self.chosen: selected.index,
            self.cropping: gr.update(visible=True),
            **dict(zip(self.square, LARGEST_SQUARE, strict=True)),
        }

    def crop(
        self, paths: list[str] | None, index: int | None, size: float, across: float, down: float, request: gr.Request
    ) -> Update:
        """The files, with the square in the place of the photo that it was cut from."""
        closed = {self.cropping: gr.update(visible=False)}
        try:
            kept = cut_square(_chosen_photo(paths, index), size, across, down)
        except InputError as error:
            return closed | {self.panel.status: problem(str(error))}
        kept.thumbnail((LARGEST_CUT, LARGEST_CUT), Image.Resampling.LANCZOS)
        path = self.results.folder(owner_of(request)) / f"{Path(paths[index]).stem[:40]}-cut.png"
        kept.save(path)
        return closed | {self.photos: [*paths[:index], str(path), *paths[index + 1 :]], self.panel.status: READY}

    def train(self, photos, name, word, method, *, owner: str) -> tuple[Work, Update]:
        del owner  # everyone may use what is trained here
        return self.trainer.train(photos or [], name=name, word=word, method=method), {}

    def _show(self, now: Progress) -> Update:
        losses = pd.DataFrame({"step": range(1, len(now.losses) + 1), "loss": now.losses})
        return {
            self.panel.status: _words(now),
            self.losses: gr.LinePlot(losses, x_lim=[1, now.steps], visible=bool(now.losses)),
            self.samples: gr.skip() if now.image is None else now.image,
        }


def _chosen_photo(paths: list[str] | None, index: int | None, side: int | None = None) -> Image.Image:
    if not paths or index is None or not 0 <= index < len(paths):
        raise InputError("Crop: choose a photo first")
    return read_photo(paths[index], side)


def _words(now: Progress) -> str:
    if now.name is not None:
        return status(f"Done: the adapter {now.name} is in the list.")
    if not now.losses:
        return status("Loading the base model and generating its samples …")
    step = len(now.losses)
    text = f"Step {step} of {now.steps}, about {now.left} left; loss {now.losses[-1]:.4f}"
    return progress(text, step / now.steps)
