"""What every tab with a job shares: how it is started, followed, found again and cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr
from PIL import Image

from ether_diffusion.demo.board import Board, Job, Waiting
from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating
from ether_diffusion.demo.markup import problem, progress, status
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.server import owner_of
from ether_diffusion.demo.settings import HIGHEST_GUIDANCE, MOST_STEPS, Settings
from ether_diffusion.demo.start import Start
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

Update = dict[gr.components.Component, Any]
"""New values of components; the others stay as they are."""
Work = Callable[[], Iterator[Any]]
"""What a board runs: its news, of which the last is the result."""


def sampling_sliders(worker: Worker, start: Settings) -> list[gr.Slider]:
    """Steps, guidance, width and height, within what fits the base."""
    smallest, largest = worker.side // 2, 2 * worker.side
    return [
        gr.Slider(1, MOST_STEPS, value=start.steps, step=1, label="Steps"),
        gr.Slider(0, HIGHEST_GUIDANCE, value=start.guidance, step=0.5, label="Guidance"),
        gr.Slider(smallest, largest, value=start.width, step=worker.unit, label="Width in pixels"),
        gr.Slider(smallest, largest, value=start.height, step=worker.unit, label="Height in pixels"),
    ]


def connect_download(
    button: gr.Button,
    make: Callable[..., Update],
    inputs: Sequence[gr.components.Component] | None,
    outputs: Sequence[gr.components.Component],
    *,
    api_name: str,
) -> gr.DownloadButton:
    """Let a click make a file and download it; `make` updates the button that is returned, which nobody sees."""
    unseen = gr.DownloadButton("File", elem_id=f"{api_name}-file", elem_classes="ether-unseen")
    made = button.click(make, inputs, [*outputs, unseen], api_name=api_name, show_progress="hidden")
    made.success(None, None, None, js=f"() => window.etherDownload('#{api_name}-file')", api_name=False)
    return unseen


class JobPanel:
    """The buttons that start and cancel a job, the line that says where it is, and its address.

    A tab places `start_button`, which is one button that becomes Cancel while it works, and then `place_status`.

    Args:
        board, lane: where its jobs run.
        name: the beginning of the elements' ids: `<name>`, `<name>-cancel`, `<name>-status`.
    """

    def __init__(self, board: Board, lane: str, name: str):
        self.board, self.lane, self.name = board, lane, name

    def start_button(self, label: str) -> gr.Button:
        """The primary button and, in its place while a job runs, Cancel."""
        self.go = gr.Button(label, variant="primary", elem_id=self.name)
        self.stop = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"{self.name}-cancel")
        return self.go

    def place_status(self) -> None:
        """The line of text, and, hidden, the address of the job that it tells of."""
        self.status = gr.HTML(status("Ready."), elem_id=f"{self.name}-status", elem_classes="ether-line")
        self.address = gr.Textbox(visible=False, elem_id=f"{self.name}-address")

    def connect(
        self,
        triggers: Sequence[Callable[..., Any]],
        prepare: Callable[..., tuple[Work, Update]],
        inputs: Sequence[gr.components.Component],
        show: Callable[[Any], Update],
        outputs: Sequence[gr.components.Component],
        *,
        api_name: str,
    ) -> gr.events.Dependency:
        """Put a job on the board when triggered, and follow it; the event, which ends with the job.

        Args:
            prepare: gets the inputs and the owner; gives the work, and what to show before its first news.
            show: what news of the work look like.
            outputs: all that `prepare` and `show` update, besides the status.
        """
        self._show = show
        self._outputs = [self.status, self.address, self.go, self.stop, *outputs]

        def start(request: gr.Request, *values: Any) -> Iterator[Update]:
            owner = owner_of(request)
            try:
                work, first = prepare(*values, owner=owner)
                job = self.board.submit(self.lane, self.name, owner, work)
            except InputError as error:
                yield {self.status: problem(str(error))}
                raise gr.Error(str(error), visible=False, print_exception=False) from None
            yield {self.status: status("Starting …"), **first, **self._buttons(job)}
            yield from self._follow(job)

        running = gr.on(
            triggers,
            start,
            list(inputs),
            self._outputs,
            api_name=api_name,
            concurrency_limit=None,  # it only follows: the board has the line
            show_progress="hidden",
            trigger_mode="once",
        )
        self.stop.click(self._cancel, self.address, None, queue=False, api_name=f"cancel_{api_name}")
        return running

    def resume(self, address: str, request: gr.Request) -> Iterator[Update]:
        """For a page that was just opened: the job at an address, or else the last of this owner, as far as it is."""
        job = self.board.find(address) if address else None
        if job is None or job.kind != self.name:
            job = self.board.latest(self.name, owner_of(request))
        if job is None:
            yield {self.status: gr.skip()}
            return
        yield from self._follow(job)

    @property
    def resumed(self) -> list[gr.components.Component]:
        """What `resume` updates."""
        return self._outputs

    def _follow(self, job: Job) -> Iterator[Update]:
        told: Update = {}
        try:
            for news in job.follow():
                shown = {self.status: _place(news)} if isinstance(news, Waiting) else self._show(news)
                # An image that is sent once more is written once more, perhaps while the browser reads its file.
                fresh = {each: value for each, value in shown.items() if not _is_same_image(value, told.get(each))}
                told |= shown
                yield {**self._buttons(job), **fresh}
        except Cancelled:
            yield {**self._buttons(job), self.status: status("Cancelled.")}
        except (InputError, Failed) as error:
            yield {**self._buttons(job), self.status: problem(str(error))}
            raise gr.Error(str(error), visible=False, print_exception=False) from None

    def _buttons(self, job: Job) -> Update:
        return {
            self.address: job.address,
            self.go: gr.update(visible=job.done),
            self.stop: gr.update(visible=not job.done),
        }

    def _cancel(self, address: str | None) -> None:
        if job := self.board.find(address or ""):
            job.cancel()


@dataclass(frozen=True)
class Shown:
    """The last news of images: their files with a caption each, a line of text, and the map that steered them."""

    is_result: ClassVar[bool] = True

    files: list[tuple[str, str]]
    summary: str
    control: Image.Image | None = None


class ImagePanel(JobPanel):
    """A job that generates: besides the line of text the preview of an image, and the images that are done."""

    def __init__(self, board: Board, worker: Worker, results: Results, name: str):
        super().__init__(board, "images", name)
        self.worker, self.results = worker, results

    def place_results(self, label: str, *, compared: bool = False) -> None:
        """The line of text, the preview and the images; with a slider between the first two, if they are compared."""
        self.place_status()
        self.preview = gr.Image(
            label="Preview", height=200, interactive=False, buttons=[], format="png", elem_classes="ether-preview"
        )
        self.gallery = gr.Gallery(
            label=label,
            columns=2,
            height="auto",
            object_fit="contain",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id=f"{self.name}-images",
            elem_classes="ether-images",
        )
        self.slider = gr.ImageSlider(
            label="Base and adapted, from one seed",
            show_label=False,
            visible=False,
            interactive=False,
            buttons=[],
            format="png",
            slider_position=50,
            elem_id=f"{self.name}-slider",
            elem_classes="ether-slider",
        )
        self.compared = compared
        self.outputs = [self.preview, self.gallery, self.slider]

    def generate(
        self, settings: Settings, owner: str, control: Image.Image | None = None, start: Start | None = None
    ) -> tuple[Work, Update]:
        """What `connect` prepares: images of these settings, and an empty panel meanwhile."""

        def work() -> Iterator[Generating | Shown]:
            for news in self.worker.generate(settings, control=control, start=start):
                if isinstance(news, Generated):
                    yield Shown(self.results.keep(news, owner), _summary(news), control)
                else:
                    yield news

        return work, {self.preview: None, self.gallery: None, self.slider: gr.update(visible=False)}

    def show(self, news: Generating | Shown) -> Update:
        if isinstance(news, Shown):
            pair = tuple(path for path, _ in news.files[:2])
            slider = gr.update(value=pair, visible=True) if self.compared and len(news.files) == 2 else gr.skip()
            return {
                self.status: status(news.summary),
                self.preview: None,
                self.gallery: news.files,
                self.slider: slider,
            }
        text = f"Image {news.image} of {news.images}, step {news.step} of {news.steps}"
        return {self.status: progress(text, news.done), self.preview: news.preview}


def _summary(done: Generated) -> str:
    seed = done.settings.seed
    seeds = f"seed {seed}" if done.settings.images == 1 else f"seeds from {seed} on"
    return f"Done in {done.seconds:.1f} s, {seeds}."


def _is_same_image(value: Any, before: Any) -> bool:
    value, before = (each.get("value") if isinstance(each, dict) else each for each in (value, before))
    return isinstance(value, Image.Image) and value is before


def _place(news: Waiting) -> str:
    jobs = "1 job is" if news.before == 1 else f"{news.before} jobs are"
    return status("Starting …" if not news.before else f"In line: {jobs} before yours.")
