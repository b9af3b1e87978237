"""The tab that generates: base and adapted model side by side, from the same seed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating
from ether_diffusion.demo.results import Results
from ether_diffusion.demo.settings import (
    HIGHEST_GUIDANCE,
    HIGHEST_SEED,
    HIGHEST_STRENGTH,
    LONGEST_PROMPT,
    MOST_ADAPTERS,
    MOST_IMAGES,
    MOST_STEPS,
    Settings,
    read_image,
)
from ether_diffusion.demo.widgets import image_boxes, size_sliders
from ether_diffusion.demo.words import STRENGTH_NOTE, cards, note, problem, progress, status
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError

RANDOM_SEEDS = 10**6
"""A seed that is drawn stays below this: short enough to be told to somebody."""


def whole(name: str, value: Any) -> int:
    """A number from the page as a whole one.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise InputError(f"{name}: got {value!r}, needs a whole number")
    return int(value)


def choices(worker: Worker, *, control: bool = False) -> list[str]:
    """Names of the adapters that a tab offers."""
    adapters = [each for each in worker.library.adapters() if each.is_control == control]
    return [each.name for each in adapters if worker.fit(each).startswith("fits")]


def listing(worker: Worker) -> str:
    return cards((each, worker.fit(each)) for each in worker.library.adapters())


def paint(
    worker: Worker, results: Results, settings: Settings, owner: str, control: Image.Image | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """News for the page: a line of text, the preview, the images; what does not change is `gr.skip()`.

    Raises:
        gr.Error: it went wrong, in words; the line of text says the same.
    """
    job = None
    try:
        job = worker.submit(settings, owner, control=control)
        yield status("In line …"), None, None
        for event in job.events():
            if isinstance(event, Generated):
                paths = results.keep(event, owner)
                seeds = f"seed {settings.seed}" if settings.images == 1 else f"seeds from {settings.seed} on"
                yield status(f"Done in {event.seconds:.1f} s, {seeds}."), None, paths
            elif isinstance(event, Generating):
                done = (event.image - 1 + event.step / event.steps) / event.images
                text = f"Image {event.image} of {event.images}, step {event.step} of {event.steps}"
                yield progress(text, done), event.preview, gr.skip()
            else:
                ahead = f"{event.place} before yours" if event.place else "yours is next"
                yield status(f"In line: {ahead}."), gr.skip(), gr.skip()
    except Cancelled:
        yield status("Cancelled."), None, gr.skip()
    except (InputError, Failed) as error:
        yield problem(str(error)), None, gr.skip()
        raise gr.Error(str(error), print_exception=False) from None
    finally:
        if job is not None:
            job.cancel()


def generate_tab(worker: Worker, results: Results) -> tuple[gr.Dropdown, gr.HTML]:
    """Build the tab; what lists adapters in it, to be brought up to date."""
    offered = choices(worker)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                label="Prompt", value=_first_prompt(worker, offered), max_length=LONGEST_PROMPT, autofocus=True
            )
            adapters = gr.Dropdown(
                offered,
                value=offered[-1:],
                multiselect=True,
                max_choices=MOST_ADAPTERS,
                label="Adapters",
                info=f"Up to {MOST_ADAPTERS}; they act in this order. None generates with the base model alone.",
                elem_id="adapters",
            )
            strengths = [
                gr.Slider(
                    0,
                    HIGHEST_STRENGTH,
                    value=1.0,
                    step=0.05,
                    label=f"Strength of {offered[-1]}" if k == 0 and offered else f"Strength {k + 1}",
                    visible=k == 0 and bool(offered),
                )
                for k in range(MOST_ADAPTERS)
            ]
            gr.HTML(note(STRENGTH_NOTE))
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Cancel", elem_id="cancel")
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=HIGHEST_SEED, min_width=120)
                draw = gr.Checkbox(label="New seed every time", value=False, min_width=120)
            images = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Number of images")
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", max_length=LONGEST_PROMPT)
                steps = gr.Slider(1, MOST_STEPS, value=25, step=1, label="Steps")
                guidance = gr.Slider(0, HIGHEST_GUIDANCE, value=5.0, step=0.5, label="Guidance")
                sides = size_sliders(worker, worker.side, worker.side)
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(status("Ready."), elem_id="status")
            preview, gallery = image_boxes("Images: base and adapted, from the same seed", "gallery")
            with gr.Accordion("Use the settings of an image", open=False):
                dropped = gr.File(label="Drop a PNG that was downloaded here", file_types=[".png"])
    with gr.Accordion("Adapters on offer", open=True):
        listed = gr.HTML(listing(worker), elem_id="listing")

    inputs = [adapters, *strengths, prompt, negative, steps, guidance, *sides, draw, seed, images]

    def generate(adapters, s1, s2, s3, prompt, negative, steps, guidance, width, height, draw, seed, images,
                 request: gr.Request):  # fmt: skip
        try:
            settings = Settings(
                prompt=prompt or "",
                negative_prompt=negative or "",
                adapters=tuple(zip(adapters or (), (s1, s2, s3), strict=False)),
                steps=whole("Steps", steps),
                guidance=guidance,
                width=whole("Width", width),
                height=whole("Height", height),
                seed=secrets.randbelow(RANDOM_SEEDS) if draw else whole("Seed", seed),
                images=whole("Number of images", images),
            )
        except InputError as error:
            yield problem(str(error)), None, gr.skip(), gr.skip()
            raise gr.Error(str(error), print_exception=False) from None
        for news in paint(worker, results, settings, str(request.session_hash)):
            yield *news, settings.seed

    outputs = [said, preview, gallery, seed]
    gr.on(
        [go.click, prompt.submit],
        generate,
        inputs,
        outputs,
        api_name="generate",
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="once",
    )

    def cancel(request: gr.Request) -> None:
        worker.cancel(str(request.session_hash))

    stop.click(cancel, api_name="cancel", queue=False, show_progress="hidden")

    def name_strengths(names: list[str] | None) -> list[dict]:
        shown = [gr.update(visible=True, label=f"Strength of {name}") for name in names or ()]
        return [*shown, *[gr.update(visible=False)] * MOST_ADAPTERS][:MOST_ADAPTERS]

    adapters.change(name_strengths, adapters, strengths, api_name=False, queue=False, show_progress="hidden")

    def restore(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * (len(inputs) + 1)
        try:
            found, control = read_image(path)
            if control is not None:
                raise InputError(f"{Path(path).name}: was generated under a map; drop it in the tab Control")
            for name, _ in found.adapters:
                worker.library.get(name)
        except InputError as error:
            return [*[gr.skip()] * len(inputs), problem(str(error))]
        weights = [weight for _, weight in found.adapters] + [1.0] * MOST_ADAPTERS
        return [
            gr.update(choices=choices(worker), value=[name for name, _ in found.adapters]),
            *weights[:MOST_ADAPTERS],
            found.prompt,
            found.negative_prompt,
            found.steps,
            found.guidance,
            found.width,
            found.height,
            False,
            found.seed,
            found.images,
            status(f"These are the settings of {Path(path).name}."),
        ]

    dropped.upload(restore, dropped, [*inputs, said], api_name="use_settings", show_progress="hidden")
    return adapters, listed


def _first_prompt(worker: Worker, offered: list[str]) -> str:
    return worker.library.get(offered[-1]).prompt if offered else ""
