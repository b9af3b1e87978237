"""Trainings for the page: the training script, one run after the other, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from PIL import Image

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.adapters.writing import write_adapter_file
from ether_diffusion.base_models import miniature_name
from ether_diffusion.control.pipelines import is_number
from ether_diffusion.demo.jobs import Cancelled, Failed
from ether_diffusion.demo.library import IMAGE_NAME, clean_name
from ether_diffusion.demo.photos import read_photo
from ether_diffusion.demo.settings import Settings, save_image
from ether_diffusion.demo.worker import Worker
from ether_diffusion.errors import InputError
from ether_diffusion.images import read_image
from ether_diffusion.training.at_step import adapter_at_step
from ether_diffusion.training.card import GRID_NAME
from ether_diffusion.training.checkpoint_files import PREFIX
from ether_diffusion.training.options import DEFAULT_METHOD, ETHER_METHODS
from ether_diffusion.training.run import VALIDATION_FOLDER

FEWEST_PHOTOS, MOST_PHOTOS = 3, 8
FEWEST_STEPS, STEPS, MOST_STEPS, PREVIEWS = 1, 200, 2000, 4
"""Of one training; previews count the sheet of samples at the end."""
SAMPLE_STEPS = 20
MOST_KEPT = 20
"""Trainings whose earlier steps can still be kept."""
TOKEN = "sks"
WORD = re.compile(r"[^\W\d_](?:[^\W_]|[ '-]){0,29}")
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
    sheets: for each step that can be kept its sheet of samples; then, too.
    """

    steps: int = STEPS
    losses: tuple[float, ...] = ()
    image: Image.Image | None = None
    left: str = "?"
    name: str | None = None
    sheets: Mapping[int, Image.Image] = field(default_factory=dict)

    @property
    def is_result(self) -> bool:
        return self.name is not None


@dataclass(frozen=True)
class Choices:
    """What is trained, and how.

    photos: image files. captions: of each; where one is empty, or there is none, the prompt is its.
    name: for the library; numbered where it is taken.
    word: what the photographs show: "dog".
    learning_rate: None: the method's default.
    """

    photos: Sequence[str | Path]
    name: str
    word: str
    captions: Sequence[str] = ()
    method: str = DEFAULT_METHOD
    steps: int = STEPS
    learning_rate: float | None = None


class Trainer:
    """Trains on the base model of a worker, one after the other; what comes of it goes into the worker's library."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._trainings: set[_Training] = set()
        self._kept: dict[str, dict[int, tuple[bytes, Image.Image]]] = {}  # of an adapter, its file at each step
        # One thread: the next training waits until the process of the last is gone, for two would share the memory.
        self._thread = ThreadPoolExecutor(1, "trainer")

    def close(self) -> None:
        """Stop all of them."""
        for training in tuple(self._trainings):
            training.stop()
        self._thread.shutdown()

    def train(self, choices: Choices, owner: str = "") -> Callable[[], Iterator[Progress]]:
        """What trains an adapter when it is called, and tells how far it is once a second; closing that stops it.

        owner: whose adapter it will be.

        Raises:
            InputError: something that cannot be trained on. What is returned raises Cancelled where the trainer was
                closed, and Failed where the process ended before it was done.
        """
        name, word = clean_name(choices.name or ""), " ".join((choices.word or "").split())
        if not WORD.fullmatch(word):
            raise InputError(f"Subject: got {word[:80]!r}, needs a word or two in letters, such as dog")
        if choices.method not in ETHER_METHODS:
            raise InputError(f"Method: got {choices.method!r}, needs one of {', '.join(ETHER_METHODS)}")
        if not isinstance(choices.steps, int) or not FEWEST_STEPS <= choices.steps <= MOST_STEPS:
            raise InputError(f"Steps: got {choices.steps!r}, needs a whole number from {FEWEST_STEPS} to {MOST_STEPS}")
        rate = choices.learning_rate
        if rate is not None and not (is_number(rate) and 0 < rate <= 1):
            raise InputError(f"Learning rate: got {rate!r}, needs a number above 0, to 1")
        if not FEWEST_PHOTOS <= len(choices.photos) <= MOST_PHOTOS:
            raise InputError(f"Photos: got {len(choices.photos)}, needs {FEWEST_PHOTOS} to {MOST_PHOTOS}")
        images = [read_photo(photo, 4 * self.worker.side) for photo in choices.photos]
        return partial(self._run, _Training(self.worker, images, replace(choices, name=name, word=word), owner))

    def keep(self, name: str, step: int, owner: str) -> Image.Image:
        """Make a trained adapter what it was after a step; the sheet of samples of then.

        Raises:
            InputError: it is not this owner's, or that step was not kept.
        """
        kept = self._kept.get(name, {}).get(step)
        if kept is None or not self.worker.library.belongs_to(name, owner):
            raise InputError(f"Keep: there is no step {step} of an adapter {name} of yours; it is kept as it is")
        content, sheet = kept
        self.worker.library.replace(name, content, owner)
        return sheet

    def _run(self, training: _Training) -> Iterator[Progress]:
        self._trainings.add(training)
        try:
            done = self._thread.submit(training.run)
            while not done.done():
                yield training.progress
                wait([done], timeout=NEWS_EVERY)
            done.result()
            self._kept[training.progress.name] = training.kept
            while len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            yield training.progress
        finally:
            training.stop()
            self._trainings.discard(training)


class _Training:
    """One run of the script. `run` is for the trainer's thread, `progress` and `stop` are for the others."""

    def __init__(self, worker: Worker, photos: list[Image.Image], choices: Choices, owner: str):
        self.worker, self.photos, self.choices, self.owner = worker, photos, choices, owner
        self.prompt = f"a photo of {TOKEN} {choices.word}"
        self.every = max(choices.steps // PREVIEWS, 1)
        self.progress = Progress(choices.steps)
        self.kept: dict[int, tuple[bytes, Image.Image]] = {}
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
                if caption := " ".join(self.choices.captions[k].split()) if k < len(self.choices.captions) else "":
                    (photos / f"{k}.txt").write_text(caption, encoding="utf-8")
            last = self._run_script(photos, out)
            if self.stopped:
                raise Cancelled("stopped")
            if self.process.returncode:
                if last.startswith(ERROR):
                    raise InputError(last.removeprefix(ERROR))
                code = self.process.returncode
                raise Failed(f"The training ended with {code} before it was done: {last[-300:]}")
            self._keep_steps(out)
            name = self.worker.library.add(self.choices.name, out, self.owner)
            self._save_sample(name)
            sheets = {step: sheet for step, (_, sheet) in self.kept.items()}
            self.progress = replace(self.progress, image=read_image(out / GRID_NAME), name=name, sheets=sheets)

    def _keep_steps(self, out: Path) -> None:
        """The adapter's file at each step of which there are samples."""
        steps, path = self.choices.steps, out / WEIGHTS_NAME
        for step in range(self.every, steps, self.every):
            sheet, earlier = out / VALIDATION_FOLDER / f"step-{step:06}.png", out / f"step-{step}.safetensors"
            if sheet.is_file() and (out / f"{PREFIX}{step}").is_dir():
                write_adapter_file(earlier, adapter_at_step(out, step))
                self.kept[step] = earlier.read_bytes(), read_image(sheet)
        self.kept[steps] = path.read_bytes(), read_image(out / GRID_NAME)

    def _run_script(self, photos: Path, out: Path) -> str:
        """Start the script and read what it says until it ends; its last line."""
        flags = {
            "instance_data_dir": photos,
            "instance_prompt": self.prompt,
            "method": self.choices.method,
            "output_dir": out,
            "max_train_steps": self.choices.steps,
            "validation_steps": self.every,
            "checkpointing_steps": self.every,
            "num_validation_images": 2,
            "num_inference_steps": SAMPLE_STEPS,
            "guidance_scale": self.worker.guidance,
            "seed": 0,
        }
        # By its name: the card of the adapter repeats the command, and a path would be one of this machine.
        flags["pretrained_model_name_or_path"] = miniature_name(self.worker.base) or self.worker.base
        flags |= {name: value for name, value in self.worker.version.items() if value is not None}
        if self.choices.learning_rate is not None:
            flags["learning_rate"] = self.choices.learning_rate
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
