"""The model of the page: it owns the pipeline, loads adapters onto it, and generates on a thread of its own.

The adapters of a request are set before its images, and everything that touches the pipeline runs on that one thread,
so no request ever sees the adapters of another.
"""

from __future__ import annotations

import gc
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.fit import fit
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.base_models import open_pipeline
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.control.pipelines import ControlMixin, native_sides, stock_class
from ether_diffusion.demo.jobs import Cancelled, Failed, Generated, Generating, Job
from ether_diffusion.demo.library import Adapter, Library
from ether_diffusion.demo.settings import Settings
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.export.lora import export_lora
from ether_diffusion.training.families import families

logger = logging.getLogger(__name__)

LOADED_AT_MOST = 32
PREVIEW_SHARE = 0.25
"""Of the time that an image takes, what previews may add at most."""


class Worker:
    """Generates with one pipeline, one request after the other.

    Args:
        base: a diffusers pipeline: a folder, or an id on the Hub.
        library: the adapters on offer.
        device: default: a GPU where there is one.
        variant, revision: of the base, as `from_pretrained` takes them.

    Attributes:
        side: the base model's own image size, in pixels.
        unit: what width and height must be a multiple of.
    """

    def __init__(
        self,
        base: str | Path,
        library: Library,
        *,
        device: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ):
        self.base, self.library = str(base), library
        self.version = {"variant": variant, "revision": revision}
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        config = DiffusionPipeline.load_config(base, revision=revision)
        kind = CONTROL_PIPELINES.get(config["_class_name"], DiffusionPipeline)
        pipe = open_pipeline(base, kind, dtype=dtype, **self.version)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)
        self.side, self.unit = _sizes(pipe)
        self._loaded: OrderedDict[str, tuple[int, int]] = OrderedDict()  # name -> stamp, least used first
        self._fits: dict[tuple[str, tuple[int, int]], str] = {}
        self._jobs: set[Job] = set()
        self._thread = ThreadPoolExecutor(1, "worker")

    @property
    def controls(self) -> bool:
        """Whether control adapters can be used on this base."""
        return isinstance(self.pipe, ControlMixin)

    def close(self) -> None:
        """End the thread; what is being generated is cancelled."""
        for job in tuple(self._jobs):
            job.cancelled = True
        self._thread.shutdown()

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, settings: Settings, *, control: Image.Image | None = None) -> Iterator[Generating | Generated]:
        """Generate, and tell how far it is; the last news are `Generated`. Closing the iterator cancels.

        Raises:
            InputError: a size or an adapter that does not fit the base.
            Cancelled: the worker was closed.
            Failed: whatever else went wrong, in words.
        """
        self._check(settings, control)
        job = Job()
        self._jobs.add(job)
        try:
            self._thread.submit(self._run, job, settings, control)
            yield from job.events()
        finally:
            job.cancelled = True
            self._jobs.discard(job)

    def _check(self, settings: Settings, control: Image.Image | None) -> None:
        for name, value in (("Width", settings.width), ("Height", settings.height)):
            if value % self.unit or not self.side // 2 <= value <= 2 * self.side:
                raise InputError(
                    f"{name}: got {value}, needs a multiple of {self.unit} from {self.side // 2} to {2 * self.side}"
                )
        chosen = [self.library.get(name) for name, _ in settings.adapters]
        controls = sum(each.is_control for each in chosen)
        if controls > 1 or (control is None) != (controls == 0):
            raise InputError(
                "Control adapters are used one at a time, with a map, in the tab Control; others without one"
            )

    def _run(self, job: Job, settings: Settings, control: Image.Image | None) -> None:
        try:
            job.tell(self._generate_all(job, settings, control))
        except (Cancelled, InputError) as error:
            job.tell(error)
        except Exception as error:  # whatever it is, the next request is served
            job.tell(self._explain(error, settings))

    def _explain(self, error: Exception, settings: Settings) -> Failed:
        """What went wrong, for the person who asked; what can be freed is freed."""
        if _is_out_of_memory(error):
            error.__traceback__ = None  # it holds the tensors of the call
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return Failed(
                f"There was not enough memory for an image of {settings.width}×{settings.height} pixels. A smaller "
                "one may fit; nothing else is affected."
            )
        logger.error("a request failed", exc_info=error)
        if isinstance(error, EtherFileError):
            return Failed(str(error))
        return Failed(f"The model failed ({type(error).__name__}: {error}). The next request starts afresh.")

    def _generate_all(self, job: Job, settings: Settings, control: Image.Image | None) -> Generated:
        started = time.perf_counter()
        total = settings.images * (2 if settings.adapters else 1)
        pairs, number = [], 1
        self._activate(settings.adapters)
        for k in range(settings.images):
            one = replace(settings, seed=settings.seed + k)
            with self._inactive():
                base = self._generate(one, None, _Watch(job, self, one.steps, number, total))
            adapted = None
            if settings.adapters:
                adapted = self._generate(one, control, _Watch(job, self, one.steps, number + 1, total))
            pairs.append((base, adapted))
            number += 2 if settings.adapters else 1
        return Generated(pairs, settings, control, time.perf_counter() - started)

    def _generate(self, settings: Settings, control: Image.Image | None, watch: _Watch) -> Image.Image:
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
        # Pipelines differ in what they take; those with control pass on what their stock class takes.
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

    def _activate(self, adapters: tuple[tuple[str, float], ...]) -> None:
        """Load these adapters and make them, in this order, the active ones."""
        for name, _ in adapters:
            self._load(self.library.get(name))
        if adapters:
            self.pipe.set_adapters([_on_pipe(name) for name, _ in adapters], [weight for _, weight in adapters])

    @contextmanager
    def _inactive(self) -> Iterator[None]:
        """The base model alone."""
        if not self._loaded:
            yield
            return
        self.pipe.disable_ether()
        try:
            yield
        finally:
            self.pipe.enable_ether()

    def _load(self, adapter: Adapter) -> None:
        """Have an adapter on the pipeline, as its file is now."""
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

    def usable(self, *, control: bool = False) -> list[str]:
        """Names of the adapters that fit the base: control adapters, or the others."""
        adapters = [each for each in self.library.adapters() if each.is_control == control]
        return [each.name for each in adapters if self.fit(each).startswith("fits")]

    def fit(self, adapter: Adapter) -> str:
        """Whether an adapter fits the base, in words."""
        if adapter.problem:
            return f"cannot be used: {adapter.problem}"
        key = (adapter.name, adapter.stamp)
        if key not in self._fits:
            try:
                self._fits[key] = self.check_file(adapter.path)
            except (ValueError, OSError) as error:
                self._fits[key] = f"does not fit: {str(error).replace(str(adapter.path), adapter.path.name)}"
        return self._fits[key]

    def check_file(self, path: Path) -> str:
        """Whether an adapter file fits the base, in words; nothing is put on the pipeline.

        Raises:
            EtherFileError: a file that cannot be loaded anywhere.
        """
        file = find_adapter_file(path)
        try:
            others = self._thread.submit(fit, self.pipe, file).result().other_base
        except EtherFileError as error:
            return f"does not fit: {str(error).replace(str(path), path.name)}"
        return f"fits, but was trained on other weights of {', '.join(others)}" if others else "fits"

    def export(self, name: str, to: str, folder: Path) -> Path:
        """Write an adapter of the library as a LoRA ("diffusers-lora" or "kohya"); the file.

        Raises:
            ValueError: the format has no name for a layer.
        """

        def write() -> Path:
            self._activate(((name, 1.0),))
            return export_lora(self.pipe, folder, to=to, weight_name=f"{name}-{to}.safetensors").path

        return self._thread.submit(write).result()


class _Watch:
    """A pipeline's callback at the end of every step: progress, previews that cost little, cancelling."""

    def __init__(self, job: Job, worker: Worker, steps: int, number: int, of: int):
        self.job, self.worker, self.steps, self.number, self.of = job, worker, steps, number, of
        if job.cancelled:  # before an image is begun, too: pipelines without callbacks are stopped here
            raise Cancelled("cancelled")
        self.began = time.perf_counter()
        self.spent = self.cost = 0.0
        self.preview: Image.Image | None = None

    def __call__(self, _pipe: DiffusionPipeline, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.job.cancelled:
            raise Cancelled("cancelled")
        begun = time.perf_counter()
        # The first preview of an image tells what one costs.
        if self.spent + self.cost <= PREVIEW_SHARE * (begun - self.began) and step + 1 < self.steps:
            self.preview = self.worker.decode(values["latents"])
            self.cost = time.perf_counter() - begun
            self.spent += self.cost
        self.job.tell(Generating(self.number, self.of, min(step + 1, self.steps), self.steps, self.preview))
        return {}


def _sizes(pipe: DiffusionPipeline) -> tuple[int, int]:
    """A pipeline's own image size, and what sizes must be a multiple of, in pixels."""
    factor, family = getattr(pipe, "vae_scale_factor", 8), families().get(stock_class(pipe).__name__)
    if family is not None and family.is_flow:
        return native_sides(pipe)[0], factor * family.patch
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    latent_side = getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size
    levels = len(getattr(denoiser.config, "block_out_channels", None) or (1, 1))
    return latent_side * factor, factor * 2 ** (levels - 1)


def _on_pipe(name: str) -> str:
    """What the pipeline calls an adapter; PyTorch has attributes of its own under names such as "keys"."""
    return f"demo_{name}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
