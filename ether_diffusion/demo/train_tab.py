"""The tab that trains an adapter from a few photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.demo.charts import line_chart
from ether_diffusion.demo.jobs import Cancelled, Failed
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.training import (
    FEWEST_PHOTOS,
    MOST_PHOTOS,
    TOKEN,
    WHOLE_SQUARE,
    Progress,
    Trainings,
    cut_square,
    read_photo,
)
from ether_diffusion.demo.words import problem, progress, status
from ether_diffusion.errors import InputError
from ether_diffusion.training.options import DEFAULT_METHOD

LARGEST_CUT = 1024
THUMBNAIL = 512
READY = status("Ready.")
METHODS = [("ETHER+ (moves both sides, the default)", "ether_plus"), ("ETHER (a quarter of the size)", "ether")]


def train_tab(trainings: Trainings, results: Results) -> Callable[..., Any]:
    """Build the tab; the event that an adapter is new, to be told of by calling it as Gradio's events are."""
    gr.Markdown(
        f"Teach the base model a subject from {FEWEST_PHOTOS} to {MOST_PHOTOS} photos. Everyone who uses this server "
        f"can then use it: say *{TOKEN}* before its word, as in *a photo of {TOKEN} dog on a red background*."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photos = gr.File(
                label=f"Photos ({FEWEST_PHOTOS} to {MOST_PHOTOS})",
                file_count="multiple",
                file_types=["image"],
                elem_id="photos",
            )
            shown = gr.Gallery(
                label="What was uploaded; choose one to crop it",
                columns=4,
                height=180,
                interactive=False,
                buttons=[],
                preview=False,
                allow_preview=False,
                elem_id="uploaded",
            )
            which, photo = gr.Number(visible=False, precision=0), gr.State()  # the one to cut, and it made small
            with gr.Column(visible=False, elem_id="cropping") as cropping:
                cut = gr.Image(label="The square to keep", interactive=False, buttons=[], height=260, elem_id="cut")
                size = gr.Slider(10, 100, 100, step=1, label="Size, % of the shorter side")
                across = gr.Slider(0, 100, 50, step=1, label="From left to right, %")
                down = gr.Slider(0, 100, 50, step=1, label="From top to bottom, %")
                keep = gr.Button("Keep this square", size="sm", elem_id="keep-cut")
            name = gr.Textbox(label="Name of the adapter", max_length=40, placeholder="my-dog")
            word = gr.Textbox(label="What the photos show", max_length=30, placeholder="dog")
            method = gr.Radio(METHODS, value=DEFAULT_METHOD, label="Method")
            with gr.Row():
                go = gr.Button("Train", variant="primary", elem_id="train")
                stop = gr.Button("Stop", elem_id="stop-training")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(READY, elem_id="training-status")
            chart = gr.HTML()
            samples = gr.Image(
                label="Samples: base above, adapted below", interactive=False, buttons=[], elem_classes="ether-samples"
            )

    def preview(paths: list[str] | None) -> tuple[Any, ...]:
        paths, closed = paths or [], (None, gr.update(visible=False))  # what was open is of other photos
        if len(paths) > MOST_PHOTOS:
            return None, problem(f"Photos: got {len(paths)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}"), *closed
        try:
            return [read_photo(path, THUMBNAIL) for path in paths], READY, *closed
        except InputError as error:
            return None, problem(str(error)), *closed

    photos.change(preview, photos, [shown, said, which, cropping], api_name=False, show_progress="hidden")

    square = [size, across, down]

    def open_cropping(paths: list[str] | None, chosen: gr.SelectData) -> tuple[Any, ...]:
        try:
            opened = _photo(paths, chosen.index, THUMBNAIL)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return opened, cut_square(opened), chosen.index, gr.update(visible=True), *WHOLE_SQUARE

    shown.select(open_cropping, photos, [photo, cut, which, cropping, *square], api_name=False, show_progress="hidden")
    gr.on(
        [slider.input for slider in square],
        cut_square,
        [photo, *square],
        cut,
        api_name=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )

    def crop(paths: list[str] | None, index: int | None, size: float, across: float, down: float, request: gr.Request):
        """The files, with the square in the place of the photo it was cut from."""
        try:
            kept = cut_square(_photo(paths, index), size, across, down)
        except InputError as error:
            return gr.skip(), gr.update(visible=False), problem(str(error))
        kept.thumbnail((LARGEST_CUT, LARGEST_CUT), Image.Resampling.LANCZOS)
        path = results.folder(str(request.session_hash)) / f"{Path(paths[index]).stem[:40]}-cut.png"
        kept.save(path)
        return [*paths[:index], str(path), *paths[index + 1 :]], gr.update(visible=False), READY

    keep.click(crop, [photos, which, *square], [photos, cropping, said], api_name="crop", show_progress="hidden")

    def train(photos, name, word, method, request: gr.Request):
        try:
            news = trainings.train(photos or [], name=name, word=word, method=method, owner=str(request.session_hash))
            for now in news:
                yield _words(now), line_chart(now.losses, "Loss", length=now.steps), _image(now)
        except Cancelled:
            yield status("Stopped; nothing was kept."), gr.skip(), gr.skip()
        except (InputError, Failed) as error:
            yield problem(str(error)), gr.skip(), gr.skip()
            raise gr.Error(str(error), print_exception=False) from None

    event = go.click(
        train,
        [photos, name, word, method],
        [said, chart, samples],
        api_name="train",
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
    )

    def end(request: gr.Request) -> None:
        trainings.stop(str(request.session_hash))

    stop.click(end, api_name="stop_training", queue=False, show_progress="hidden")
    return event.then


def _photo(paths: list[str] | None, index: int | None, side: int | None = None) -> Image.Image:
    if not paths or index is None or not 0 <= index < len(paths):
        raise InputError("Crop: choose a photo first")
    return read_photo(paths[index], side)


def _words(now: Progress) -> str:
    if now.name is not None:
        return status(f"Done: the adapter {now.name} is in the list.")
    if now.place:
        return status(f"In line: {now.place} before yours. Stop gives the place up.")
    if now.step == 0:
        return status("Loading the base model and generating its samples …")
    left = "" if now.seconds_left is None else f", about {now.seconds_left:.0f} s left"
    return progress(f"Step {now.step} of {now.steps}{left}", now.step / now.steps)


def _image(now: Progress) -> Any:
    if now.picture is None:
        return gr.skip()
    with Image.open(now.picture) as image:
        return image.convert("RGB")
