"""Trainings for the page: the training script, one run after the other, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from ether_diffusion.base_models import miniature_name
from ether_diffusion.demo.jobs import Cancelled, Failed
from ether_diffusion.demo.library import IMAGE_NAME, clean_name
from ether_diffusion.demo.photos import read_photo
from ether_diffusion.demo.settings import Settings, save_image
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError
from ether_diffusion.images import read_image
from ether_diffusion.training.card import GRID_NAME
from ether_diffusion.training.options import ETHER_METHODS
from ether_diffusion.training.run import VALIDATION_FOLDER

FEWEST_PHOTOS, MOST_PHOTOS = 3, 8
STEPS, PREVIEWS = 200, 4
"""Of one training; previews count the sheet of samples at the end."""
SAMPLE_STEPS = 20
TOKEN = "sks"
WORD = re.compile(r"[A-Za-z][A-Za-z -]{0,29}")
PATIENCE = 10.0
"""Seconds that a process has to end in after it was asked to."""
NEWS_EVERY = 1.0
"""Seconds."""
# The script's progress bar is how it tells where it is; tqdm reads the form of its bars from the environment.
BAR = {"TQDM_BAR_FORMAT": "{desc}|{n_fmt}|{remaining}|{postfix}", "TQDM_MININTERVAL": "0"}
BAR_LINE = re.compile(r"training\|(\d+)\|([\d:?]+)\|, loss=([^,]+)")
ERROR = "error: "
"""What the script's last line begins with when it can explain why it ends."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    losses: of every step so far.
    image: the newest sheet of samples.
    left: the time until the last step, as minutes:seconds; "?" while nobody knows.
    name: of the adapter, when it is in the library.
    """

    steps: int = STEPS
    losses: tuple[float, ...] = ()
    image: Image.Image | None = None
    left: str = "?"
    name: str | None = None


class Trainer:
    """Trains on the base model of a worker, one after the other; what comes of it goes into the worker's library."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._trainings: set[_Training] = set()
        # One thread: the next training waits until the process of the last is gone, for two would share the memory.
        self._thread = ThreadPoolExecutor(1, "trainer")

    def close(self) -> None:
        """Stop all of them."""
        for training in tuple(self._trainings):
            training.stop()
        self._thread.shutdown()

    def train(
        self, photos: Sequence[str | Path], *, name: str, word: str, method: str, steps: int = STEPS
    ) -> Callable[[], Iterator[Progress]]:
        """What trains an adapter when it is called, and tells how far it is once a second; closing that stops it.

        Args:
            photos: 3 to 8 image files.
            name: for the library; numbered where it is taken.
            word: what the photographs show: "dog".
            method: "ether_plus" or "ether".
            steps: of the optimiser.

        Raises:
            InputError: something that cannot be trained on. What is returned raises Cancelled where the trainer was
                closed, and Failed where the process ended before it was done.
        """
        name, word = clean_name(name or ""), " ".join((word or "").split())
        if not WORD.fullmatch(word):
            raise InputError(f"Subject: got {word[:80]!r}, needs a word or two in letters, such as dog")
        if method not in ETHER_METHODS:
            raise InputError(f"Method: got {method!r}, needs one of {', '.join(ETHER_METHODS)}")
        if not FEWEST_PHOTOS <= len(photos) <= MOST_PHOTOS:
            raise InputError(f"Photos: got {len(photos)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}")
        images = [read_photo(photo, 4 * self.worker.side) for photo in photos]
        training = _Training(self.worker, images, name, f"a photo of {TOKEN} {word}", method, steps)
        return partial(self._run, training)

    def _run(self, training: _Training) -> Iterator[Progress]:
        self._trainings.add(training)
        try:
            done = self._thread.submit(training.run)
            while not done.done():
                yield training.progress
                wait([done], timeout=NEWS_EVERY)
            done.result()
            yield training.progress
        finally:
            training.stop()
            self._trainings.discard(training)


class _Training:
    """One run of the script. `run` is for the trainer's thread, `progress` and `stop` are for the others."""

    def __init__(self, worker: Worker, photos: list[Image.Image], name: str, prompt: str, method: str, steps: int):
        self.worker, self.photos, self.name = worker, photos, name
        self.prompt, self.method, self.steps = prompt, method, steps
        self.progress = Progress(steps)
        self.stopped = False
        self.process: subprocess.Popen | None = None

    def stop(self) -> None:
        """Ask the process to end; it is killed if it does not."""
        self.stopped = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            killer = threading.Timer(PATIENCE, self.process.kill)
            killer.daemon = True
            killer.start()

    def run(self) -> None:
        """Train, and put what comes of it into the library, with an image of it."""
        if self.stopped:  # while it waited for the process before it
            raise Cancelled("stopped")
        with tempfile.TemporaryDirectory(prefix="ether-training-") as folder:
            photos, out = Path(folder, "photos"), Path(folder, "out")
            photos.mkdir()
            for k, photo in enumerate(self.photos):
                photo.save(photos / f"{k}.png")
            last = self._run_script(photos, out)
            if self.stopped:
                raise Cancelled("stopped")
            if self.process.returncode:
                if last.startswith(ERROR):
                    raise InputError(last.removeprefix(ERROR))
                code = self.process.returncode
                raise Failed(f"The training ended with {code} before it was done: {last[-300:]}")
            name = self.worker.library.add(self.name, out)
            self._save_sample(name)
            self.progress = replace(self.progress, image=read_image(out / GRID_NAME), name=name)

    def _run_script(self, photos: Path, out: Path) -> str:
        """Start the script and read what it says until it ends; its last line."""
        flags = {
            "instance_data_dir": photos,
            "instance_prompt": self.prompt,
            "method": self.method,
            "output_dir": out,
            "max_train_steps": self.steps,
            "validation_steps": max(self.steps // PREVIEWS, 1),
            "num_validation_images": 2,
            "num_inference_steps": SAMPLE_STEPS,
            "guidance_scale": self.worker.guidance,
            "seed": 0,
        }
        # By its name: the card of the adapter repeats the command, and a path would be one of this machine.
        flags["pretrained_model_name_or_path"] = miniature_name(self.worker.base) or self.worker.base
        flags |= {name: value for name, value in self.worker.version.items() if value is not None}
        command = [sys.executable, "-m", "ether_diffusion.training.dreambooth"]
        command += [f"--{flag}={value}" for flag, value in flags.items()]
        device = {"ACCELERATE_USE_CPU": "true"} if self.worker.device == "cpu" else {}
        last = ""
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **device, **BAR},
        ) as self.process:
            if self.stopped:  # while it was being started
                self.stop()
            for line in self.process.stderr:
                if told := BAR_LINE.match(line):
                    self._note(told, out / VALIDATION_FOLDER)
                last = line.strip() or last
        return last

    def _note(self, told: re.Match[str], previews: Path) -> None:
        step, left, loss = int(told[1]), told[2], float(told[3])
        now = self.progress
        if step > len(now.losses):
            now = replace(now, losses=(*now.losses, loss), left=left)
        # A preview is generated between two lines of the bar, so those that were begun before this one are written.
        if (path := previews / f"step-{step - 1:06}.png").is_file():
            now = replace(now, image=read_image(path))
        self.progress = now

    def _save_sample(self, name: str) -> None:
        """Put an image of the trained prompt beside an adapter of the library."""
        side = self.worker.side
        settings = Settings(
            prompt=self.prompt,
            adapters=((name, 1.0),),
            steps=SAMPLE_STEPS,
            guidance=self.worker.guidance,
            width=side,
            height=side,
        )
        *_, generated = self.worker.generate(settings)
        ((_, image),) = generated.images  # of the base, and adapted
        save_image(image, self.worker.library.get(name).path.parent / IMAGE_NAME, settings)
