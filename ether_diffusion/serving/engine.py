"""The engine: many requests on one pipeline, whose forwards are joined, with adapters of its own for each.

Each request runs the pipeline's own call on a thread of its own, over a shallow copy with its own scheduler. One
thread runs at a time: each until it calls a model. Then calls that can be are made as one forward, with a timestep and
an adapter for each row. So any pipeline and scheduler of diffusers is served as it is.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.serving import checks
from ether_diffusion.serving.alone import run_alone
from ether_diffusion.serving.catalogue import Catalogue, check_folder
from ether_diffusion.serving.coroutines import Coroutine
from ether_diffusion.serving.forwards import Counts, Forwards
from ether_diffusion.serving.job import EngineClosed, Job, Request
from ether_diffusion.serving.limits import HOST_BYTES, MAX_LINE
from ether_diffusion.serving.line import Line
from ether_diffusion.serving.measure import Measurement
from ether_diffusion.serving.probe import measure_pipeline
from ether_diffusion.serving.proxies import CODECS, make_proxies
from ether_diffusion.serving.requests import Requests, RowEstimates
from ether_diffusion.serving.resident import ResidentAdapters
from ether_diffusion.serving.running import Running, ThreadSettings
from ether_diffusion.serving.store import Store


class Engine:
    """Serves one pipeline: `submit` gives a job, whose `result()` is what the pipeline's call returns.

    A context manager; leaving it waits for what was submitted. The pipeline must not be used otherwise meanwhile.

    Args:
        pipe: a pipeline of diffusers, without adapters.
        adapters: a folder of adapters (`<name>.safetensors`, `<name>/`), or an object that has their `names()` and can
            `find(name)` a path; asked for every request. None: none.
        max_batch: rows of a forward (an image is one, with classifier-free guidance two). "auto" measures what a
            forward costs and takes the largest batch that is worth its while; it may be 1.
        max_line: requests that may wait.
        host_bytes: of adapters that are held in main memory.
        typical: arguments of a call for "auto" to measure; default: a prompt, and the pipeline's own size.

    Attributes:
        measurement: what "auto" measured, else None.
        max_batch: rows of a forward.

    Raises:
        InputError: a pipeline that cannot be served, or arguments that do not fit.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        adapters: str | Path | Catalogue | None = None,
        *,
        max_batch: int | str = "auto",
        max_line: int = MAX_LINE,
        host_bytes: int = HOST_BYTES,
        typical: Mapping[str, Any] | None = None,
    ) -> None:
        if max_batch != "auto":
            checks.check_count("max_batch", max_batch, or_else=", or 'auto'")
        checks.check_count("max_line", max_line)
        checks.check_count("host_bytes", host_bytes)
        if isinstance(adapters, str | Path):
            check_folder(adapters)
        checks.check_pipeline(pipe)
        self.pipe = pipe
        self._proxies = make_proxies(pipe)
        self._settings = ThreadSettings(pipe._execution_device)
        self.measurement: Measurement | None = None
        if max_batch == "auto":
            self.measurement = measure_pipeline(pipe, self._proxies, self._settings, typical)
            max_batch = self.measurement.max_batch
        self.max_batch = max_batch
        self._adapters = None
        if adapters is not None:
            self._adapters = ResidentAdapters(pipe, adapters, max_rows=max_batch, host_bytes=host_bytes)
        self._forwards = Forwards(
            max_batch,
            [name for name in self._proxies if name.startswith(checks.DENOISERS)],
            None if self._adapters is None else self._adapters.rows,
            [name for name, model in self._proxies.items() if _adaptable(name, model)],
        )
        self._requests, self._estimates = Requests(pipe, self._adapters), RowEstimates()
        self._line = Line(max_line)
        self._running: list[Running] = []
        self._starting: Job | None = None  # out of the line, and not among those that run, or running alone
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, drain=False)

    # Requests -------------------------------------------------------------------------------------------------------

    def submit(
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
    ) -> Job:
        """Put a request in line.

        Args:
            adapter: a name, or names with strengths in the order of composition; None: the base model.
            seed: of the images, or one for each; default: drawn, and `job.seed` tells.
            scheduler: in place of the pipeline's; it is copied.
            pipeline: another class of pipelines for the same models, such as StableDiffusionImg2ImgPipeline.
            client: whose request it is; clients take turns.
            timeout: seconds from now to the result.
            on_step: called with the job after each of its steps. While it runs nothing else does; if it raises, the
                request fails with that.
            arguments: of the pipeline's call. With a `control_image`, which Stable Diffusion and SDXL take with a
                control adapter, the request runs alone.

        Raises:
            UnknownAdapter, InputError, EtherFileError: what cannot be served; nothing is in line then.
            EngineFull: as many requests wait as may.
            EngineClosed: the engine was closed.
        """
        own = {"scheduler": scheduler, "pipeline": pipeline, "client": client, "timeout": timeout, "on_step": on_step}
        (job,) = self.submit_all([{**arguments, **own, "adapter": adapter, "seed": seed}])
        return job

    def submit_all(self, requests: Sequence[Mapping[str, Any]]) -> list[Job]:
        """Put several requests in line at once, each as `submit` takes it: all of them or, if it raises, none.

        None starts before all are in line, so those that fit into a batch together are joined from their first step.
        """
        self._check_room(len(requests))
        return self._add([self._requests.make(**each) for each in requests])

    def call_alone(
        self,
        function: Callable[[DiffusionPipeline], Any],
        *,
        adapter: str | Mapping[str, float] | None = None,
        client: str = "",
    ) -> Job:
        """Put a call in line that uses the pipeline itself, such as one that exports adapters, with nothing beside it.

        function: called with the pipeline on the engine's thread; its result is the job's. It leaves the pipeline as
            it was: what it attaches, it detaches.
        adapter: attached to the pipeline meanwhile, as `submit` takes it.

        Raises:
            UnknownAdapter, InputError, EtherFileError, EngineFull, EngineClosed: as `submit`.
        """
        self._check_room(1)
        (job,) = self._add([self._requests.make_alone(function, adapter, client)])
        return job

    def _add(self, requests: Sequence[Request]) -> list[Job]:
        jobs = [Job(request, _withdraw=self._withdraw) for request in requests]
        for job in jobs:  # its future must not hold it, or both and the images wait for the garbage collector
            job.future.add_done_callback(partial(self._withdraw_cancelled, weakref.ref(job)))
        with self._changed:
            self._check_room(len(jobs))
            for job in jobs:
                self._line.add(job)
            self._changed.notify()
        return jobs

    def _check_room(self, count: int) -> None:
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was closed")
            self._line.check_room(count)

    def _withdraw_cancelled(self, reference: weakref.ref[Job], future: Future) -> None:
        job = reference()
        if job is not None and future.cancelled():
            self._withdraw(job)

    def _withdraw(self, job: Job) -> None:
        """Take a job that has a reason to stop out of the line; one that runs is stopped by its own thread."""
        with self._changed:
            waited = self._line.remove(job)
            self._changed.notify()
        if waited:
            job.finish(error=job.reason_to_stop())

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end those that are there, and leave the pipeline as it was.

        Args:
            drain: wait for them; else they are stopped within a step, with EngineClosed.
            timeout: seconds to wait before they are stopped.
        """
        if threading.current_thread() is self._thread or Coroutine.current() is not None:
            raise RuntimeError("close() was called by a request of the engine: it would wait for itself")
        with self._changed:
            self._closing = True
            self._changed.notify()
        if drain:
            self._thread.join(timeout)
        self._stop_all(EngineClosed("the engine was closed"))
        self._thread.join()
        if self._adapters is not None:
            self._adapters.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(drain=kind is None)

    def _stop_all(self, reason: Exception) -> None:
        with self._changed:
            jobs = [*self._line, *self._begun()]
        for job in jobs:
            job.stop(reason)

    # What a server tells --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests in line."""
        with self._changed:
            return len(self._line)

    @property
    def running(self) -> int:
        """Requests that have begun."""
        with self._changed:
            return len(self._begun())

    def _begun(self) -> set[Job]:
        return {each.job for each in self._running} | ({self._starting} - {None})

    @property
    def store(self) -> Store | None:
        """The adapters of the folder."""
        return None if self._adapters is None else self._adapters.store

    def check_adapter(self, path: str | Path) -> None:
        """Read an adapter from anywhere with all checks, and let go of it.

        Raises:
            InputError: the engine was made without a folder of adapters.
            FileNotFoundError, OSError, ValueError: it cannot be read, or does not fit the pipeline.
        """
        if self._adapters is None:
            raise InputError("this engine was made without a folder of adapters")
        self._adapters.check(Path(path))

    @property
    def alive(self) -> bool:
        """Whether it takes requests, or still works on those that it took."""
        return self._thread.is_alive()

    @property
    def counts(self) -> Counts:
        """What the forwards have come to."""
        return self._forwards.counts

    @property
    def busy_since(self) -> float | None:
        """When the forward began that runs now, on `time.monotonic()`'s clock; for a watchdog."""
        return self._forwards.busy_since

    # The engine's thread --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with self._settings.entered():
                while self._await_work():
                    self._start_what_fits()
                    self._advance()
                    self._forward()
        except BaseException as error:  # of the engine itself: nobody may wait for ever
            reason = EngineClosed(f"the engine failed: {error!r}")
            with self._changed:
                self._closing = True
                begun = self._begun()
            self._stop_all(reason)
            for running in self._running:
                with suppress(Exception):
                    running.advance()
            for job in begun:
                job.finish(error=reason)
            raise

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when the engine is closed and all is done."""
        with self._changed:
            while True:
                stopped = [job for job in self._line if job.reason_to_stop() is not None]
                for job in stopped:
                    self._line.remove(job)
                if stopped or self._running or len(self._line):
                    break
                if self._closing:
                    return False
                self._changed.wait()
        for job in stopped:
            job.finish(error=job.reason_to_stop())
        return True

    def _start_what_fits(self) -> None:
        """Start requests in their turn while their rows fit beside those that run; the first waits until they do."""
        while True:
            with self._changed:
                job = self._line.first()
                if job is None:
                    return
                rows = self._estimates.estimate(job.request)
                taken = sum(each.rows for each in self._running)
                if self._running and (job.request.alone or taken + rows > self.max_batch):
                    return
                self._line.take()
                self._starting = job
            job.times["started"] = time.monotonic()
            if job.request.alone:
                self._run_alone(job)
            else:
                self._start(job, rows)
            with self._changed:
                self._starting = None

    def _run_alone(self, job: Job) -> None:
        with nullcontext() if self._adapters is None else self._adapters.away():
            run_alone(job, self._settings)

    def _start(self, job: Job, rows: int) -> None:
        adapter_row = 0
        if self._adapters is not None:
            try:
                adapter_row = self._adapters.take_row(job.request.adapters)
            except Exception as error:  # no memory for its factors, say
                job.finish(error=error)
                return
            job.release_adapters()
        running = Running(job, rows=rows, adapter_row=adapter_row, proxies=self._proxies, settings=self._settings)
        with self._changed:
            self._running.append(running)

    def _advance(self) -> None:
        """Let each request run to its next call of a model, one after the other."""
        for running in list(self._running):
            try:
                if running.advance():
                    self._end(running)
                else:
                    self._count_rows(running)
            except Exception as error:
                running.job.finish(error=error)
                raise

    def _count_rows(self, running: Running) -> None:
        """The rows that a request takes, known from its first call of a denoiser."""
        waiting = running.waiting
        if not running.is_counted and waiting.rows and waiting.call.component in self._forwards.denoisers:
            running.rows, running.is_counted = waiting.rows, True
            self._estimates.learn(running.job.request, waiting.rows)

    def _end(self, running: Running) -> None:
        with self._changed:
            self._running.remove(running)
        if self._adapters is not None:
            self._adapters.free_row(running.adapter_row)

    def _forward(self) -> None:
        waiting = sorted((each for each in self._running if each.waiting is not None), key=lambda each: each.since)
        if waiting:
            self._forwards.run(self._forwards.choose([each.waiting for each in waiting]))


def _adaptable(name: str, model: nn.Module) -> bool:
    """Whether adapters may be on a component: on all but autoencoders, and what looks at images."""
    is_codec = any(hasattr(type(model), method) for method in CODECS)
    return not is_codec and name not in ("safety_checker", "image_encoder")
