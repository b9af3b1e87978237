"""What `Engine.submit` is given, checked and complete: a `Request`."""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

from ether_diffusion.control.pipelines import is_number
from ether_diffusion.errors import InputError
from ether_diffusion.serving import checks
from ether_diffusion.serving.job import Job, Request
from ether_diffusion.serving.resident import ResidentAdapters
from ether_diffusion.serving.siblings import make_control_sibling, make_sibling


class Requests:
    """Makes requests to one pipeline and its siblings."""

    def __init__(self, pipe: DiffusionPipeline, adapters: ResidentAdapters | None) -> None:
        self._pipe, self._adapters = pipe, adapters
        self._siblings: dict[Any, DiffusionPipeline] = {}
        self._lock = threading.Lock()

    def make(
        self,
        *,
        adapter: str | Mapping[str, float] | None = None,
        seed: int | Sequence[int] | None = None,
        scheduler: Any = None,
        pipeline: type[DiffusionPipeline] | None = None,
        client: str = "",
        timeout: float | None = None,
        on_step: Callable[[Job], None] | None = None,
        **arguments: Any,
    ) -> Request:
        """A request, with everything checked and its adapters read.

        Raises:
            UnknownAdapter, InputError, EtherFileError: what does not fit.
        """
        pipe = self._sibling(pipeline)
        alone = arguments.get("control_image") is not None
        if alone:
            pipe = self._sibling("control", pipe)
        checks.check_arguments(pipe, arguments)
        checks.check_seeds(pipe, arguments, seed)
        checks.check_timeout(timeout)
        if seed is None and arguments.get("generator") is None and checks.takes(pipe, "generator"):
            seed = secrets.randbelow(2**32)
        deadline = None if timeout is None else time.monotonic() + timeout
        return Request(
            pipe=pipe,
            arguments=arguments,
            adapters=self._read(adapter, alone=alone),
            seeds=seed,
            scheduler=copy.deepcopy(self._pipe.scheduler if scheduler is None else scheduler),
            client=client,
            timeout=timeout,
            deadline=deadline,
            on_step=on_step,
            alone=alone,
        )

    def make_alone(
        self,
        function: Callable[[DiffusionPipeline], Any],
        adapter: str | Mapping[str, float] | None,
        client: str,
    ) -> Request:
        """A request of a call of the pipeline's; raises as `make`."""
        adapters = self._read(adapter, alone=True)
        return Request(self._pipe, {}, adapters, None, None, client, None, None, None, alone=True, function=function)

    def _read(self, adapter: str | Mapping[str, float] | None, *, alone: bool) -> list[tuple[Any, float]]:
        """The adapters that are asked for, with their strengths: on the host, or their files for a request alone.

        Raises:
            UnknownAdapter, InputError, EtherFileError: what does not fit.
        """
        strengths = checks.strengths_of(adapter)
        if strengths and self._adapters is None:
            raise InputError("adapter: this engine was made without a folder of adapters")
        read = None if self._adapters is None else self._adapters.file if alone else self._adapters.get
        return [(read(name), strength) for name, strength in strengths.items()]

    def _sibling(self, kind: Any, pipe: DiffusionPipeline | None = None) -> DiffusionPipeline:
        """The pipeline of another class, made once; "control" for the one that applies control encoders."""
        if kind is None:
            return self._pipe
        with self._lock:
            if kind not in self._siblings:
                made = make_control_sibling(pipe) if kind == "control" else make_sibling(self._pipe, kind)
                self._siblings[kind] = made
            return self._siblings[kind]


class RowEstimates:
    """How many rows of a batch a request will take, by what others of its kind have taken."""

    def __init__(self) -> None:
        self._per_image: dict[tuple[type, bool], float] = {}

    def estimate(self, request: Request) -> int:
        """The rows of a request that has not begun: two for each image with guidance, until one of its kind has."""
        kind = _kind(request)
        per_image = self._per_image.get(kind, 2.0 if kind[1] else 1.0)
        return max(1, round(per_image * checks.count_images(request.arguments)))

    def learn(self, request: Request, rows: int) -> None:
        """Remember what one has taken."""
        self._per_image[_kind(request)] = rows / checks.count_images(request.arguments)


def _kind(request: Request) -> tuple[type, bool]:
    """What the rows for an image depend on: the pipeline, and whether it is guided."""
    default = checks.parameters_of(request.pipe).get("guidance_scale")
    scale = request.arguments.get("guidance_scale", None if default is None else default.default)
    return type(request.pipe), is_number(scale) and scale > 1
