"""The one thread that generates: it owns pipeline and adapters, and takes requests in the order in which they come.

Which adapters act is part of a request. They are set before its images and nobody else generates in between, so no
request ever sees those of another.
"""

from __future__ import annotations

import gc
import inspect
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.adapters import pipeline as loaders
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.fit import fit
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.control.pipelines import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating, Job, Waiting
from ether_diffusion.demo.library import Adapter, Library
from ether_diffusion.demo.settings import Settings
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.export.lora import export_lora

logger = logging.getLogger(__name__)

LOADED_AT_MOST = 32
LONGEST_LINE, MOST_PER_OWNER = 64, 8
PREVIEW_SHARE = 0.25
"""Of the time that an image takes, what previews may add at most."""
WITH_CONTROL = {
    "StableDiffusionPipeline": EtherControlPipeline,
    "StableDiffusionXLPipeline": EtherControlXLPipeline,
}
"""By the class of the base; they generate the same images, and take control adapters besides."""


class Worker:
    """Generates with one pipeline, one request after the other.

    Args:
        base: a diffusers pipeline: a folder, or an id on the Hub.
        library: the adapters on offer.
        device: default: a GPU where there is one.

    Attributes:
        side: the base model's own image size, in pixels.
        unit: what width and height must be a multiple of.
    """

    def __init__(self, base: str | Path, library: Library, *, device: str | None = None):
        loaders.install()
        self.base, self.library = str(base), library
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        kind = WITH_CONTROL.get(DiffusionPipeline.load_config(base)["_class_name"], DiffusionPipeline)
        pipe = kind.from_pretrained(base, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)
        self._model = threading.RLock()
        self._line = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._current: Job | None = None
        self._loaded: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name -> stamp, least used first
        self._fits: dict[tuple[str, tuple[int, int]], str] = {}
        self._closed = False
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        factor = getattr(pipe, "vae_scale_factor", 8)
        latent_side = getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size
        levels = len(getattr(denoiser.config, "block_out_channels", None) or (1, 1))
        self.side, self.unit = latent_side * factor, factor * 2 ** (levels - 1)
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    @property
    def controls(self) -> bool:
        """Whether control adapters can be used on this base."""
        return isinstance(self.pipe, EtherControlPipeline | EtherControlXLPipeline)

    # The line ---------------------------------------------------------------------------------------------------

    def submit(self, settings: Settings, owner: str = "", *, control: Image.Image | None = None) -> Job:
        """Put a request in line.

        Raises:
            InputError: a size or an adapter that does not fit the base, or the line is full.
        """
        for name, value in (("Width", settings.width), ("Height", settings.height)):
            if value % self.unit or not self.side // 2 <= value <= 2 * self.side:
                raise InputError(
                    f"{name}: got {value}, needs a multiple of {self.unit} from {self.side // 2} to {2 * self.side}"
                )
        chosen = [self.library.get(name) for name, _ in settings.adapters]
        steered = [each.name for each in chosen if each.is_control]
        if len(steered) > 1 or (control is None) != (not steered):
            raise InputError(
                "Control adapters are used one at a time, with a map, in the tab Control; others without one"
            )
        job = Job(settings, owner, control)
        with self._line:
            own = sum(each.owner == owner for each in self._jobs)
            if len(self._jobs) >= LONGEST_LINE or own >= MOST_PER_OWNER:
                raise InputError(
                    f"the line is full ({len(self._jobs)} requests, {own} of them yours); try again in a moment"
                )
            self._jobs.append(job)
            self._tell_places()
            self._line.notify_all()
        return job

    def cancel(self, owner: str) -> None:
        """Take back everything that this owner has asked for."""
        with self._line:
            for job in [each for each in self._jobs if each.owner == owner]:
                self._jobs.remove(job)
                job.fail(Cancelled("cancelled"))
            self._tell_places()
            if self._current is not None and self._current.owner == owner:
                self._current.cancel()

    def close(self) -> None:
        """End the thread; what is in line is not generated."""
        with self._line:
            self._closed = True
            for job in (*self._jobs, self._current):
                if job is not None:
                    job.cancel()
            self._line.notify_all()
        self._thread.join(timeout=60)

    def _tell_places(self) -> None:
        ahead = 0 if self._current is None else 1
        for place, job in enumerate(self._jobs, ahead):
            job.tell(Waiting(place))

    def _work(self) -> None:
        while True:
            with self._line:
                self._line.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    for job in self._jobs:
                        job.fail(Cancelled("the server is going down"))
                    return
                self._current = job = self._jobs.popleft()
                self._tell_places()
            try:
                if job.given_up:
                    raise Cancelled("cancelled")
                with self._model:
                    generated = self._generate_all(job)
                job.tell(generated)
            except (Cancelled, InputError, Failed) as error:
                job.fail(error)
            except Exception as error:  # whatever it is, the next request is served
                job.fail(self._explain(error, job.settings))
            finally:
                with self._line:
                    self._current = None

    def _explain(self, error: Exception, settings: Settings) -> Failed:
        """What went wrong, for the person who asked; what can be freed is freed."""
        if _is_out_of_memory(error):
            error.__traceback__ = None  # it holds the tensors of the call
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return Failed(
                f"There was not enough memory for a picture of {settings.width}×{settings.height} pixels. A smaller "
                "one may fit; nothing else is affected."
            )
        logger.error("a request failed", exc_info=error)
        if isinstance(error, EtherFileError):
            return Failed(str(error))
        return Failed(f"The model failed ({type(error).__name__}: {error}). The next request starts afresh.")

    # Generating ---------------------------------------------------------------------------------------------------

    def _generate_all(self, job: Job) -> Generated:
        settings, started = job.settings, time.perf_counter()
        passes = 2 if settings.adapters else 1
        pictures = []
        with self._adapters(settings.adapters) as rest:
            for k in range(settings.images):
                one = replace(settings, seed=settings.seed + k)
                with rest():
                    base = self._generate(job, one, None, k * passes + 1, settings.images * passes)
                adapted = None
                if settings.adapters:
                    adapted = self._generate(job, one, job.control, k * passes + 2, settings.images * passes)
                pictures.append((base, adapted))
        return Generated(pictures, settings, job.control, time.perf_counter() - started)

    @contextmanager
    def _adapters(self, adapters: tuple[tuple[str, float], ...]) -> Iterator[Callable[[], Any]]:
        """The adapters at work, in this order; what is given is a context in which they rest."""
        for name, _ in adapters:
            self._load(self.library.get(name))

        @contextmanager
        def resting() -> Iterator[None]:
            if self._loaded:
                self.pipe.disable_ether()
            try:
                yield
            finally:
                if self._loaded:
                    self.pipe.enable_ether()

        if adapters:
            self.pipe.set_adapters([_on_pipe(name) for name, _ in adapters], [weight for _, weight in adapters])
        yield resting

    def _generate(
        self, job: Job, settings: Settings, control: Image.Image | None, number: int, of: int
    ) -> Image.Image:
        watch = _Watch(job, self, settings.steps, number, of)
        arguments = {
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "generator": torch.Generator().manual_seed(settings.seed),
            "callback_on_step_end": watch,
        }
        if settings.negative_prompt:
            arguments["negative_prompt"] = settings.negative_prompt
        if control is not None:
            arguments["control_image"] = control
        stock = type(self.pipe)._stock if self.controls else type(self.pipe)
        known = inspect.signature(stock.__call__).parameters
        if "negative_prompt" in arguments and "negative_prompt" not in known:
            raise InputError("Negative prompt: this base model takes none; leave it empty")
        if "callback_on_step_end" not in known:
            del arguments["callback_on_step_end"]
        with torch.inference_mode(False), torch.no_grad():
            return self.pipe(settings.prompt, **arguments).images[0]

    def decode(self, latents: torch.Tensor) -> Image.Image | None:
        """A look at half-finished latents (1, c, h, w); None where they have another form."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None or latents.ndim != 4:
            return None
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        values = latents[:1].to(vae.dtype) / vae.config.scaling_factor + shift
        return self.pipe.image_processor.postprocess(vae.decode(values, return_dict=False)[0], output_type="pil")[0]

    # Adapters ---------------------------------------------------------------------------------------------------

    def _load(self, adapter: Adapter) -> None:
        """Have an adapter on the pipeline. The caller holds the model."""
        if self._loaded.get(adapter.name) == adapter.stamp:
            self._loaded.move_to_end(adapter.name)
            return
        if self._loaded.pop(adapter.name, None) is not None:
            self.pipe.delete_adapters(_on_pipe(adapter.name))
        while len(self._loaded) >= LOADED_AT_MOST:
            oldest, _ = self._loaded.popitem(last=False)
            self.pipe.delete_adapters(_on_pipe(oldest))
        attach(self.pipe, find_adapter_file(adapter.path), _on_pipe(adapter.name))
        self._loaded[adapter.name] = adapter.stamp

    def fit(self, adapter: Adapter) -> str:
        """Whether an adapter fits the base, in words."""
        if adapter.problem:
            return f"cannot be used: {adapter.problem}"
        key = (adapter.name, adapter.stamp)
        if key not in self._fits:
            with self._model:
                try:
                    self._load(adapter)
                    differing = self.pipe.ether_adapters[_on_pipe(adapter.name)].other_base
                    self._fits[key] = (
                        f"fits, but was trained on other weights of {', '.join(differing)}" if differing else "fits"
                    )
                except (ValueError, OSError) as error:
                    self._fits[key] = f"does not fit: {str(error).replace(str(adapter.path), adapter.path.name)}"
        return self._fits[key]

    def check_file(self, path: Path) -> str:
        """Whether an adapter file fits the base, in words; nothing is put on the pipeline.

        Raises:
            EtherFileError: a file that cannot be loaded anywhere.
        """
        checkpoint = find_adapter_file(path)
        with self._model:
            try:
                fit(self.pipe, checkpoint)
            except EtherFileError as error:
                return f"does not fit: {str(error).replace(str(path), path.name)}"
        return "fits"

    def export(self, name: str, to: str, folder: Path) -> Path:
        """Write an adapter of the library as a LoRA ("diffusers-lora" or "kohya"); the file.

        Raises:
            ValueError: the format has no name for a layer.
        """
        with self._model:
            with self._adapters(((name, 1.0),)):
                return export_lora(self.pipe, folder, to=to, weight_name=f"{name}-{to}.safetensors").path


class _Watch:
    """A pipeline's callback at the end of every step: progress, previews that cost little, cancelling."""

    def __init__(self, job: Job, worker: Worker, steps: int, number: int, of: int):
        self.job, self.worker, self.steps, self.number, self.of = job, worker, steps, number, of
        self.began = time.perf_counter()
        self.spent = self.cost = 0.0
        self.preview: Image.Image | None = None

    def __call__(self, _pipe: DiffusionPipeline, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.job.given_up:
            raise Cancelled("cancelled")
        begun = time.perf_counter()
        # The first preview of an image tells what one costs.
        if self.spent + self.cost <= PREVIEW_SHARE * (begun - self.began) and step + 1 < self.steps:
            self.preview = self.worker.decode(values["latents"])
            self.cost = time.perf_counter() - begun
            self.spent += self.cost
        self.job.tell(Generating(self.number, self.of, min(step + 1, self.steps), self.steps, self.preview))
        return {}


def _on_pipe(name: str) -> str:
    """What the pipeline calls an adapter; PyTorch has attributes of its own under names such as "keys"."""
    return f"demo_{name}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
