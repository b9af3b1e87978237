"""Trainings for the page: one at a time, each in a process of its own, through the package's training code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .. import miniature
from ..training.command_line import InputError
from ..training.images import read_image
from ..training.options import ETHER_METHODS
from ..training.run import VALIDATION_FOLDER
from .library import clean_name
from .worker import Cancelled, Failed, Worker

FEWEST_PHOTOS, MOST_PHOTOS = 3, 8
MOST_PHOTO_PIXELS = 50_000_000
STEPS = 200
TOKEN = "sks"
WORD = re.compile(r"[A-Za-z][A-Za-z -]{0,29}")
PATIENCE = 10.0
"""Seconds that a process has to end in after it was asked to."""


@dataclass
class Progress:
    """How far a training is. `name` is set when the adapter is in the library, under that name."""

    step: int = 0
    steps: int = STEPS
    losses: list[float] = field(default_factory=list)
    picture: Path | None = None
    seconds_left: float | None = None
    name: str | None = None


class Trainings:
    """Starts and stops trainings on the base model of a worker; what they yield goes into its library."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._turn = threading.Lock()
        self._running: tuple[str, subprocess.Popen] | None = None
        self._stopped: set[str] = set()

    def stop(self, owner: str) -> None:
        """End this owner's training, if it is the one at work."""
        running = self._running
        if running is not None and running[0] == owner:
            self._stopped.add(owner)
            running[1].terminate()

    def train(
        self, photos: Sequence[str | Path], *, name: str, word: str, method: str, owner: str = "", steps: int = STEPS
    ) -> Iterator[Progress]:
        """Train an adapter, and tell how far it is, about once a second and after every sample picture.

        Args:
            photos: 3 to 8 picture files.
            name: for the library; numbered where it is taken.
            word: what the photographs show: "dog".
            method: "ether_plus" or "ether".
            owner: who asks, for `stop`.
            steps: of the optimiser.

        Raises:
            InputError: something that cannot be trained on; or another training is at work.
            Cancelled: it was stopped.
            Failed: the process ended otherwise.
        """
        name, word = clean_name(name or ""), " ".join((word or "").split())
        if not WORD.fullmatch(word):
            raise InputError(f"Subject: got {word[:80]!r}, needs a word or two in letters, such as dog")
        if method not in ETHER_METHODS:
            raise InputError(f"Method: got {method!r}, needs one of {', '.join(ETHER_METHODS)}")
        if not FEWEST_PHOTOS <= len(photos) <= MOST_PHOTOS:
            raise InputError(f"Photos: got {len(photos)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}")
        if not self._turn.acquire(blocking=False):
            raise InputError("another training is at work, and there is room for one; try again in a minute or two")
        try:
            with tempfile.TemporaryDirectory(prefix="ether-training-") as folder:
                yield from self._train(Path(folder), photos, name, f"a photo of {TOKEN} {word}", method, owner, steps)
        finally:
            self._stopped.discard(owner)
            self._running = None
            self._turn.release()

    def _train(
        self,
        folder: Path,
        photos: Sequence[str | Path],
        name: str,
        prompt: str,
        method: str,
        owner: str,
        steps: int,
    ) -> Iterator[Progress]:
        (folder / "photos").mkdir()
        for k, photo in enumerate(photos):
            read_photo(photo, 4 * self.worker.side).save(folder / "photos" / f"{k}.png")
        base = self.worker.base
        task = {
            "base": None if base == str(miniature.FOLDER) else base,
            "photos": str(folder / "photos"),
            "prompt": prompt,
            "method": method,
            "output_dir": str(folder / "out"),
            "steps": steps,
            "seed": 0,
        }
        command = [sys.executable, "-m", "ether_diffusion.demo.train_one", json.dumps(task)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._running = (owner, process)
        try:
            news = _News(process, folder / "out" / VALIDATION_FOLDER, steps)
            yield Progress(steps=steps)
            while process.poll() is None:
                time.sleep(1.0)
                yield news.now()
            news.thread.join(timeout=PATIENCE)
        finally:
            _end(process)
        if owner in self._stopped:
            raise Cancelled("stopped")
        if news.error is not None:
            raise InputError(news.error)
        if not news.done:
            last = ((folder / "log").read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise Failed(f"The training ended with {process.returncode} before it was done: {last[-300:]}")
        done = news.now()
        done.picture = folder / "out" / "grid.png"
        done.name = self.worker.library.add(name, folder / "out")
        yield done


class _News:
    """Reads what a training process says, in a thread."""

    def __init__(self, process: subprocess.Popen, pictures: Path, steps: int):
        self.process, self.pictures, self.steps = process, pictures, steps
        self.losses: list[float] = []
        self.began = time.monotonic()
        self.error: str | None = None
        self.done = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a library's own words
            if not isinstance(said, dict):
                continue
            if "loss" in said:
                if not self.losses:
                    self.began = time.monotonic()
                self.losses.append(float(said["loss"]))
            self.error = said.get("error", self.error)
            self.done = self.done or bool(said.get("done"))

    def now(self) -> Progress:
        step = len(self.losses)
        each = (time.monotonic() - self.began) / (step - 1) if step > 1 else None
        painted = sorted(self.pictures.glob("step-*.png"))[:-1] if self.process.poll() is None else []
        return Progress(
            step=step,
            steps=self.steps,
            losses=list(self.losses),
            # The newest may still be written.
            picture=painted[-1] if painted else None,
            seconds_left=None if each is None else each * (self.steps - step),
        )


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_photo(path: str | Path, side: int) -> Image.Image:
    """A photograph as upright RGB, no side longer than `side`.

    Raises:
        InputError: no picture, a damaged one, or one with too many pixels, which is then not decoded.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as error:  # decoders raise what they like; whatever it is, this is no picture
        raise InputError(f"{name}: is not a picture that can be read") from error
    if pixels > MOST_PHOTO_PIXELS:
        raise InputError(f"{name}: has {pixels:,} pixels; {MOST_PHOTO_PIXELS:,} at most fit")
    image = read_image(path, name)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
