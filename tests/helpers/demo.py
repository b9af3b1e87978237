"""What tests do with the web page: start it, and ask it for images as clients of its API do."""

import functools
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import gradio_client
import numpy as np
from PIL import Image

from ether_diffusion.base_models import MINIATURE
from ether_diffusion.commands.demo import serve
from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.settings import Settings
from ether_diffusion.demo.worker import Worker

PROMPT = "a photo of sks toy on a red background"
STEPS = 2
MAX_BATCH = 8
"""What \"auto\" finds is not the same every time."""


def serve_page(folder: Path, **flags: object):
    """The demo as its command starts it, on a free port; the page, with `local_url`, `worker` and `trainer`."""
    usual = {"base": MINIATURE, "adapters": None, "host": "127.0.0.1", "port": 0, "share": False, "auth": None}
    usual |= {"variant": None, "revision": None, "max_batch": MAX_BATCH}
    before = os.environ.get("GRADIO_TEMP_DIR")  # `serve` sets it, for its process; other pages of this one need theirs
    page = serve(Namespace(**usual | {"device": "cpu"} | flags), folder)
    page.temporary_before = before
    return page


def close(page) -> None:
    page.close()
    page.board.close()
    page.trainer.close()
    page.worker.close()
    if page.temporary_before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = page.temporary_before


def connect(page) -> gradio_client.Client:
    patient = {"timeout": 60}
    return gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False, httpx_kwargs=patient)


def generate(worker: Worker, *, control: Image.Image | None = None, **settings: object) -> Generated:
    settings = {"prompt": PROMPT, "steps": STEPS} | settings
    *_, last = worker.generate(Settings(**settings), control=control)
    return last


def count_steps(worker: Worker, monkeypatch) -> list:
    """A list that grows by one with every denoising step of the worker."""
    kind, taken = type(worker.pipe.scheduler), []  # every image has a scheduler of its own
    step = kind.step

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*args, **kwargs):
        taken.append(None)
        return step(*args, **kwargs)

    monkeypatch.setattr(kind, "step", counted)
    return taken


def ask(client, *adapters: tuple[str, float], seed: int = 0, steps: int = STEPS, **others: object):
    """What the page answers, an `Answer` where it is read by that: status, address, preview, gallery, slider, seed."""
    strengths = [strength for _, strength in adapters] + [1.0] * 3
    usual = {"prompt": PROMPT, "negative": "", "width": 64, "height": 64, "draw": False, "count": 1, "grid": False}
    given = usual | {"start": None, "change": 0.6} | others
    return client.submit(
        [name for name, _ in adapters], *strengths[:3], given["prompt"], given["negative"], steps, 5.0,
        given["width"], given["height"], given["draw"], seed, given["count"], given["grid"], given["start"],
        given["change"], api_name="/generate",
    )  # fmt: skip


class Answer(NamedTuple):
    status: str
    address: str
    preview: Any
    gallery: list[dict]
    slider: Any
    seed: int

    @property
    def files(self) -> list[Path]:
        return [Path(each["image"]) for each in self.gallery]


def told(job) -> str:
    """The last status of a job of a client's; empty before the first."""
    return outputs[-1][0] if (outputs := job.outputs()) else ""


def images_of(answer) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in Answer(*answer).files]


def uploaded(photographs: Path) -> list:
    """Photographs as the page's gallery has them."""
    return [in_gallery(path) for path in sorted(photographs.iterdir())]


def in_gallery(path: Path) -> dict:
    return {"image": gradio_client.handle_file(path), "caption": None}
