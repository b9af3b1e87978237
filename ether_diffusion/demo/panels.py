"""What the two tabs that generate share: how an image is asked for, and where it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.demo.jobs import Cancelled, Failed, Generated
from ether_diffusion.demo.markup import problem, progress, status
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import HIGHEST_GUIDANCE, MOST_STEPS, Settings
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

Update = dict[gr.components.Component, Any]
"""New values of components; the others stay as they are."""


def sampling_sliders(worker: Worker, start: Settings) -> list[gr.Slider]:
    """Steps, guidance, width and height, within what fits the base."""
    smallest, largest = worker.side // 2, 2 * worker.side
    return [
        gr.Slider(1, MOST_STEPS, value=start.steps, step=1, label="Steps"),
        gr.Slider(0, HIGHEST_GUIDANCE, value=start.guidance, step=0.5, label="Guidance"),
        gr.Slider(smallest, largest, value=start.width, step=worker.unit, label="Width in pixels"),
        gr.Slider(smallest, largest, value=start.height, step=worker.unit, label="Height in pixels"),
    ]


def stop_by(
    button: gr.Button,
    running: gr.events.Dependency,
    stopped: Callable[[], Any],
    outputs: gr.components.Component | Sequence[gr.components.Component],
) -> None:
    """Let a button end an event of its user, also one that waits in line, and then show that it was stopped."""
    # In a second step: what the event had sent before it ended would otherwise come after it.
    ended = button.click(None, cancels=running, queue=False, api_name=False)
    ended.then(stopped, None, outputs, queue=False, api_name=False, show_progress="hidden")


class ImagePanel:
    """A line of text, the preview of the image that is being generated, and the images that are done."""

    def __init__(self, worker: Worker, results: Results, label: str, *, gallery_id: str, status_id: str):
        self.worker, self.results = worker, results
        self.status = gr.HTML(status("Ready."), elem_id=status_id, elem_classes="ether-line")
        self.preview = gr.Image(
            label="Preview", height=200, interactive=False, buttons=[], format="png", elem_classes="ether-preview"
        )
        self.gallery = gr.Gallery(
            label=label,
            columns=2,
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id=gallery_id,
        )
        self.outputs = [self.status, self.preview, self.gallery]

    def connect(
        self,
        triggers: Sequence[Callable[..., Any]],
        cancel: gr.Button,
        generate: Callable[..., Iterator[Update]],
        inputs: Sequence[gr.components.Component],
        more_outputs: Sequence[gr.components.Component] = (),
        *,
        api_name: str,
    ) -> None:
        """Generate when triggered, and stop by a button. The requests of both tabs wait in one line of Gradio's."""
        generating = gr.on(
            triggers,
            generate,
            inputs,
            [*self.outputs, *more_outputs],
            api_name=api_name,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="full",
            show_progress_on=self.status,  # the place in line
            trigger_mode="once",
        )
        stop_by(cancel, generating, lambda: (status("Cancelled."), None), [self.status, self.preview])

    def generate(
        self, settings: Settings, request: gr.Request, control: Image.Image | None = None
    ) -> Iterator[Update]:
        """Updates of the panel, up to the images.

        Raises:
            gr.Error: it went wrong, in words; the line of text says the same.
        """
        try:
            yield {self.status: status("Starting …"), self.preview: None, self.gallery: None}
            for news in self.worker.generate(settings, control=control):
                if isinstance(news, Generated):
                    files = self.results.keep(news, str(request.session_hash))
                    yield {self.status: _summary(news), self.preview: None, self.gallery: files}
                else:
                    text = f"Image {news.image} of {news.images}, step {news.step} of {news.steps}"
                    yield {self.status: progress(text, news.done), self.preview: news.preview}
        except Cancelled:
            yield {self.status: status("Cancelled."), self.preview: None}
        except (InputError, Failed) as error:
            yield from self.explain(error)

    def explain(self, error: Exception) -> Iterator[Update]:
        """An error in the line of text, where it stays, and as Gradio's own, which clients of the API get as well.

        Raises:
            gr.Error: after the update.
        """
        yield {self.status: problem(str(error)), self.preview: None}
        raise gr.Error(str(error), print_exception=False) from None


def _summary(done: Generated) -> str:
    seed = done.settings.seed
    seeds = f"seed {seed}" if done.settings.images == 1 else f"seeds from {seed} on"
    return status(f"Done in {done.seconds:.1f} s, {seeds}.")
