"""The tab that trains an adapter from a few photographs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from ..training.command_line import InputError
from ..training.options import DEFAULT_METHOD
from .charts import line_chart
from .training import FEWEST_PHOTOS, MOST_PHOTOS, TOKEN, Progress, Trainings, read_photo
from .words import problem, progress, status
from .worker import Cancelled, Failed

METHODS = [("ETHER+ (moves both sides, the default)", "ether_plus"), ("ETHER (a quarter of the size)", "ether")]


def train_tab(trainings: Trainings) -> Callable[..., Any]:
    """Build the tab; the event that an adapter is new, to be told of by calling it as Gradio's events are."""
    gr.Markdown(
        f"Teach the base model a subject from {FEWEST_PHOTOS} to {MOST_PHOTOS} photos. Everyone who uses this server "
        f"can then paint with it: say *{TOKEN}* before its word, as in *a photo of {TOKEN} dog on a red background*."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photos = gr.File(
                label=f"Photos ({FEWEST_PHOTOS} to {MOST_PHOTOS})",
                file_count="multiple",
                file_types=["image"],
                elem_id="photos",
            )
            shown = gr.Gallery(label="What was uploaded", columns=4, height=180, interactive=False, buttons=[])
            name = gr.Textbox(label="Name of the adapter", max_length=40, placeholder="my-dog")
            word = gr.Textbox(label="What the photos show", max_length=30, placeholder="dog")
            method = gr.Radio(METHODS, value=DEFAULT_METHOD, label="Method")
            with gr.Row():
                go = gr.Button("Train", variant="primary", elem_id="train")
                stop = gr.Button("Stop", elem_id="stop-training")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(status("Ready."), elem_id="training-status")
            chart = gr.HTML()
            samples = gr.Image(
                label="Samples: base above, adapted below", interactive=False, buttons=[], elem_classes="ether-samples"
            )

    def preview(paths: list[str] | None) -> tuple[Any, str]:
        paths = paths or []
        if len(paths) > MOST_PHOTOS:
            return None, problem(f"Photos: got {len(paths)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}")
        try:
            return [read_photo(path, 256) for path in paths], status("Ready.")
        except InputError as error:
            return None, problem(str(error))

    photos.change(preview, photos, [shown, said], api_name=False, show_progress="hidden")

    def train(photos, name, word, method, request: gr.Request):
        try:
            news = trainings.train(photos or [], name=name, word=word, method=method, owner=str(request.session_hash))
            for now in news:
                yield _words(now), line_chart(now.losses, "Loss", length=now.steps), _picture(now)
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


def _words(now: Progress) -> str:
    if now.name is not None:
        return status(f"Done: the adapter {now.name} is in the list.")
    if now.step == 0:
        return status("Loading the base model and painting its samples …")
    left = "" if now.seconds_left is None else f", about {now.seconds_left:.0f} s left"
    return progress(f"Step {now.step} of {now.steps}{left}", now.step / now.steps)


def _picture(now: Progress) -> Any:
    if now.picture is None:
        return gr.skip()
    with Image.open(now.picture) as image:
        return image.convert("RGB")
