"""Trainings for the page: one after the other, each in a process of its own, through the package's training code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.demo.jobs import ABANDONED_AFTER, Cancelled, Failed
from ether_diffusion.demo.library import clean_name
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError
from ether_diffusion.images import read_image
from ether_diffusion.training.options import ETHER_METHODS
from ether_diffusion.training.run import VALIDATION_FOLDER

FEWEST_PHOTOS, MOST_PHOTOS = 3, 8
MOST_PHOTO_PIXELS = 50_000_000
STEPS = 200
TOKEN = "sks"
WORD = re.compile(r"[A-Za-z][A-Za-z -]{0,29}")
LONGEST_LINE = 8
WHOLE_SQUARE = (100, 50, 50)
"""Size and place, for `cut_square`, of the square that training would see."""
PATIENCE = 10.0
"""Seconds that a process has to end in after it was asked to."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    place: how many are before it; 0 when it is at work.
    name: of the adapter, when it is in the library.
    """

    step: int = 0
    steps: int = STEPS
    losses: list[float] = field(default_factory=list)
    picture: Path | None = None
    seconds_left: float | None = None
    name: str | None = None
    place: int = 0


@dataclass(eq=False)
class _Turn:
    """Somebody's place in the line of trainings. `asked` is when they last wanted news."""

    owner: str
    asked: float = field(default_factory=time.monotonic)
    process: subprocess.Popen | None = None
    stopped: bool = False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        self.stopped = True
        if self.process is not None:
            self.process.terminate()


class Trainings:
    """Trains on the base model of a worker, one after the other; what comes of it goes into the worker's library."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._line: list[_Turn] = []
        self._lock = threading.Lock()

    def stop(self, owner: str) -> None:
        """End this owner's training, or free its place in line."""
        with self._lock:
            for turn in self._line:
                if turn.owner == owner:
                    turn.stop()

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            for turn in self._line:
                turn.stop()

    def train(
        self, photos: Sequence[str | Path], *, name: str, word: str, method: str, owner: str = "", steps: int = STEPS
    ) -> Iterator[Progress]:
        """Wait for a turn, train an adapter, and tell how far it is, about once a second.

        Args:
            photos: 3 to 8 image files.
            name: for the library; numbered where it is taken.
            word: what the photographs show: "dog".
            method: "ether_plus" or "ether".
            owner: who asks, for `stop`.
            steps: of the optimiser.

        Raises:
            InputError: something that cannot be trained on; the line is full, or this owner is in it already.
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
        with tempfile.TemporaryDirectory(prefix="ether-training-") as made:
            folder = Path(made)
            (folder / "photos").mkdir()
            for k, photo in enumerate(photos):
                read_photo(photo, 4 * self.worker.side).save(folder / "photos" / f"{k}.png")
            turn = self._join(owner)
            try:
                while place := self._place(turn):
                    yield Progress(steps=steps, place=place)
                    time.sleep(1.0)
                for progress in self._run(turn, folder, f"a photo of {TOKEN} {word}", method, steps):
                    turn.asked = time.monotonic()
                    yield progress
                added = self.worker.library.add(name, folder / "out")
                yield replace(progress, picture=folder / "out" / "grid.png", name=added)
            finally:
                with self._lock:
                    self._line = [each for each in self._line if each is not turn]

    def _join(self, owner: str) -> _Turn:
        with self._lock:
            if any(turn.owner == owner for turn in self._line):
                raise InputError("a training of yours is in line already; stop it, or wait for it")
            if len(self._line) >= LONGEST_LINE:
                raise InputError(f"the line is full ({len(self._line)} trainings); try again in a few minutes")
            self._line.append(_Turn(owner))
            return self._line[-1]

    def _place(self, turn: _Turn) -> int:
        """How many are before this one. Those that nobody has asked for in a while are sent away.

        Raises:
            Cancelled: it was stopped.
        """
        with self._lock:
            turn.asked = time.monotonic()
            for each in self._line:
                if turn.asked - each.asked > ABANDONED_AFTER:
                    each.stop()
            # One that is at work keeps its place until it has ended: two would share the memory.
            self._line = [each for each in self._line if not each.stopped or each.is_running or each is turn]
            if turn.stopped or turn not in self._line:
                raise Cancelled("stopped")
            return self._line.index(turn)

    def _run(self, turn: _Turn, folder: Path, prompt: str, method: str, steps: int) -> Iterator[Progress]:
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
        device = {"ACCELERATE_USE_CPU": "true"} if self.worker.device == "cpu" else {}
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **device}
            )
        try:
            with self._lock:
                turn.process = process
            news = _News(process, folder / "out" / VALIDATION_FOLDER, steps)
            yield news.now()
            while process.poll() is None and not turn.stopped:
                time.sleep(1.0)
                yield news.now()
        finally:
            _end(process)
        news.thread.join(timeout=PATIENCE)
        if turn.stopped:
            raise Cancelled("stopped")
        if news.error is not None:
            raise InputError(news.error)
        if not news.done:
            last = ((folder / "log").read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise Failed(f"The training ended with {process.returncode} before it was done: {last[-300:]}")
        yield news.now()


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
        generated = sorted(self.pictures.glob("step-*.png"))[:-1] if self.process.poll() is None else []
        return Progress(
            step=step,
            steps=self.steps,
            losses=list(self.losses),
            # The newest may still be written.
            picture=generated[-1] if generated else None,
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


def read_photo(path: str | Path, side: int | None = None) -> Image.Image:
    """A photograph as upright RGB, no side longer than `side` if that is given.

    Raises:
        InputError: no image, a damaged one, or one with too many pixels, which is then not decoded.
    """
    name = Path(path).name
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as error:  # decoders raise what they like; whatever it is, this is no image
        raise InputError(f"{name}: is not an image that can be read") from error
    if pixels > MOST_PHOTO_PIXELS:
        raise InputError(f"{name}: has {pixels:,} pixels; {MOST_PHOTO_PIXELS:,} at most fit")
    image = read_image(path, name)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def cut_square(image: Image.Image, size: float = 100, across: float = 50, down: float = 50) -> Image.Image:
    """A square of an image; by default the one that training would see, the largest in the middle.

    size: its side, in percent of the image's shorter side. across, down: where it lies, from 0, at the left or the
    top, to 100, at the right or the bottom. Numbers beyond 0 and 100 count as these; a square has one pixel at least.
    """
    size, across, down = (min(max(share, 0), 100) / 100 for share in (size, across, down))
    side = max(1, round(size * min(image.size)))
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    return image.crop((left, top, left + side, top + side))
