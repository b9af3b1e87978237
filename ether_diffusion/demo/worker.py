"""The model of the page: a pipeline in the engine, which generates with the adapters of the library."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.adapters.fit import fit
from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.base_models import open_for_inference
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.demo.jobs import Failed, Generated, Generating, News
from ether_diffusion.demo.library import Adapter, Library
from ether_diffusion.demo.sampling import guidance, sizes
from ether_diffusion.demo.settings import Settings
from ether_diffusion.demo.start import Start, start_arguments, task_class
from ether_diffusion.errors import EtherFileError, InputError
from ether_diffusion.export.beyond import check_expressible
from ether_diffusion.export.lora import export_lora
from ether_diffusion.serving.checks import takes
from ether_diffusion.serving.engine import Engine
from ether_diffusion.serving.job import Cancelled, EngineClosed
from ether_diffusion.training.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class Worker:
    """What the page asks of a base model; images, base and adapted, are requests to its engine.

    Args:
        base: a diffusers pipeline: a folder, or an id on the Hub.
        library: the adapters on offer.
        device: default: a GPU where there is one.
        max_batch: rows of a forward, as `Engine` takes it.
        variant, revision: of the base, as `from_pretrained` takes them.

    Attributes:
        side: the base model's own image size, in pixels.
        unit: what width and height must be a multiple of.
        guidance: the value to start with.
    """

    def __init__(
        self,
        base: str | Path,
        library: Library,
        *,
        device: str | None = None,
        max_batch: int | str = "auto",
        variant: str | None = None,
        revision: str | None = None,
    ):
        self.base, self.library = str(base), library
        self.version = {"variant": variant, "revision": revision}
        config = DiffusionPipeline.load_config(base, revision=revision)
        kind = CONTROL_PIPELINES.get(config["_class_name"], DiffusionPipeline)
        self.base_class = config["_class_name"]
        self.pipe = open_for_inference(base, kind, device=device, **self.version)
        self.device = device or self.pipe.device.type
        self.side, self.unit = sizes(self.pipe)
        self._guidance_argument, self.guidance = guidance(self.pipe)
        self.engine = Engine(self.pipe, library, max_batch=max_batch)
        self._fits: dict[tuple[str, tuple[int, int]], str] = {}

    def takes(self, argument: str) -> bool:
        """Whether the base's pipeline takes an argument, such as a negative prompt."""
        return takes(self.pipe, argument)

    def start(self) -> Settings:
        """What the page starts with."""
        return Settings(prompt="an image", width=self.side, height=self.side, guidance=self.guidance)

    def close(self) -> None:
        """End the engine; what is being generated is cancelled."""
        self.engine.close(drain=False)

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(
        self, settings: Settings, *, control: Image.Image | None = None, start: Start | None = None
    ) -> Iterator[Generating | Generated]:
        """Generate, and tell how far it is; the last news are `Generated`. Closing the iterator cancels.

        control: a map, for a control adapter. start: what the images start from, in place of noise.

        Raises:
            InputError: a size, an adapter or a start that does not fit the base.
            Cancelled: the worker was closed.
            Failed: whatever else went wrong, in words.
        """
        started = time.perf_counter()
        self._check(settings, control)
        # At strength 0 it is the base's image: what is the same is generated once.
        columns = [column if any(strength for _, strength in column) else () for column in settings.columns]
        kinds = list(dict.fromkeys(columns))
        news = News(len(kinds) * settings.images, settings.steps, self.decode)
        jobs = []
        try:
            jobs = self.engine.submit_all(self._requests(settings, control, start, kinds, news))
            yield from news.follow(jobs)
            images = [job.result().images[0] for job in jobs]
        except (Cancelled, InputError):
            raise
        except EngineClosed as error:
            raise Cancelled(str(error)) from None
        except Exception as error:  # whatever it is, the next request is served
            raise self._explain(error, settings) from None
        finally:
            for job in jobs:
                job.cancel()
        places = [kinds.index(column) for column in columns]
        rows = [images[k : k + len(kinds)] for k in range(0, len(images), len(kinds))]
        yield Generated(
            [tuple(row[place] for place in places) for row in rows], settings, control, time.perf_counter() - started
        )

    def starts_from_images(self, task: str = "image2image") -> bool:
        """Whether diffusers has a pipeline that does "image2image" or "inpainting" with this base."""
        return task_class(self.base_class, task) is not None

    def _check(self, settings: Settings, control: Image.Image | None) -> None:
        for name, value in (("Width", settings.width), ("Height", settings.height)):
            if value % self.unit or not self.side // 2 <= value <= 2 * self.side:
                raise InputError(
                    f"{name}: got {value}, needs a multiple of {self.unit} from {self.side // 2} to {2 * self.side}"
                )
        if settings.negative_prompt and not self.takes("negative_prompt"):
            raise InputError("Negative prompt: this base model takes none; leave it empty")
        chosen = [self.library.get(name) for name, _ in settings.adapters]
        controls = sum(each.is_control for each in chosen)
        if controls > 1 or (control is None) != (controls == 0):
            raise InputError(
                "Control adapters are used one at a time, with a map, in the tab Control; others without one"
            )

    def _requests(
        self,
        settings: Settings,
        control: Image.Image | None,
        start: Start | None,
        kinds: Sequence[tuple[tuple[str, float], ...]],
        news: News,
    ) -> list[dict[str, Any]]:
        """To the engine: for each seed an image with the adapters of each kind."""
        own = self._arguments(settings)
        if start is not None:
            own = {name: value for name, value in own.items() if name not in ("width", "height")}
            own |= self._start(settings, start)
        requests = []
        for number in range(len(kinds) * settings.images):
            seed, adapters = settings.seed + number // len(kinds), kinds[number % len(kinds)]
            request = {**own, "seed": seed, "on_step": partial(news.step, number)}
            if self.takes("callback_on_step_end"):
                request["callback_on_step_end"] = partial(news.look, number)
            if adapters:
                request |= {"adapter": dict(adapters)} | ({} if control is None else {"control_image": control})
            requests.append(request)
        return requests

    def _arguments(self, settings: Settings) -> dict[str, Any]:
        """Of the pipeline's call, for all images."""
        arguments = {
            "prompt": settings.prompt,
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.steps,
        }
        if self.takes(self._guidance_argument):
            arguments[self._guidance_argument] = settings.guidance
        if settings.negative_prompt:
            arguments["negative_prompt"] = settings.negative_prompt
        elif self._guidance_argument == "true_cfg_scale":  # without a negative prompt there would be no guidance
            arguments["negative_prompt"] = " "
        return arguments

    def _start(self, settings: Settings, start: Start) -> dict[str, Any]:
        """What a request has beside, or in place of, `_arguments`, where it starts from an image."""
        task = "image2image" if start.mask is None else "inpainting"
        kind = task_class(self.base_class, task)
        if kind is None:
            what = "start from an image" if start.mask is None else "paint a part of an image anew"
            raise InputError(f"Start image: diffusers has no pipeline by which this base model can {what}")
        arguments = start_arguments(kind, start, (settings.width, settings.height))
        return {"pipeline": kind} | arguments

    def _explain(self, error: Exception, settings: Settings) -> Failed:
        """What went wrong, for the person who asked."""
        if is_out_of_memory(error):
            return Failed(
                f"There was not enough memory for an image of {settings.width}×{settings.height} pixels. A smaller "
                "one may fit; nothing else is affected."
            )
        logger.error("a request failed", exc_info=error)
        if isinstance(error, EtherFileError):
            return Failed(str(error))
        return Failed(f"The model failed ({type(error).__name__}: {error}). The next request starts afresh.")

    def decode(self, latents: torch.Tensor) -> Image.Image | None:
        """A look at half-finished latents (1, c, h, w); None where they have another form."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None or latents.ndim != 4:
            return None
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        values = latents[:1].to(vae.dtype) / vae.config.scaling_factor + shift
        return self.pipe.image_processor.postprocess(vae.decode(values, return_dict=False)[0], output_type="pil")[0]

    # Adapters ---------------------------------------------------------------------------------------------------

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
            with self.engine.store.reading:  # no request has its adapters on the pipeline itself meanwhile
                others = fit(self.pipe, file).other_base
        except EtherFileError as error:
            return f"does not fit: {str(error).replace(str(path), path.name)}"
        return f"fits, but was trained on other weights of {', '.join(others)}" if others else "fits"

    def export(self, name: str, to: str, folder: Path) -> Path:
        """Write an adapter of the library as a LoRA ("diffusers-lora" or "kohya"); the file.

        Raises:
            ValueError: the format has no name for a layer, or the adapter holds what no LoRA can.
        """
        try:
            adapter = find_adapter_file(self.library.get(name).path)
            check_expressible(adapter, "a LoRA", to=to, base_class=self.base_class)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

        def write(pipe: DiffusionPipeline) -> Path:
            return export_lora(pipe, folder, to=to, weight_name=f"{name}-{to}.safetensors").path

        return self.engine.call_alone(write, adapter=name).result()
