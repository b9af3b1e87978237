"""A request that runs: its pipeline's call as a coroutine, its row of adapters, and the call that it waits with."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.serving.coroutines import Coroutine, Stop
from ether_diffusion.serving.forwards import Waiting
from ether_diffusion.serving.job import EngineClosed, Job, Progress
from ether_diffusion.serving.proxies import copy_for_request


class ThreadSettings:
    """What PyTorch keeps for each thread, as it is where this is made; gradients are off."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have them on this thread."""
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            if self.autocast:
                stack.enter_context(torch.autocast(self.device.type, self.autocast_dtype))
            stack.enter_context(torch.no_grad())
            yield


class Progressing:
    """A request's call of its pipeline, which tells how far it is, and stops when there is a reason to."""

    def __init__(self, job: Job, settings: ThreadSettings) -> None:
        self.job, self._settings = job, settings
        self._pipe: DiffusionPipeline | None = None

    def generate(self, proxies: Mapping[str, nn.Module]) -> Any:
        """Call the pipeline on this thread, with these in place of its models.

        Raises:
            Stop: there was a reason to stop.
        """
        request = self.job.request
        with self._settings.entered():
            self._pipe = copy_for_request(request.pipe, proxies, request.scheduler, self._after_step)
            arguments = dict(request.arguments)
            if isinstance(request.seeds, int):
                arguments["generator"] = torch.Generator().manual_seed(request.seeds)
            elif request.seeds is not None:
                arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in request.seeds]
            try:
                return self._pipe(**arguments)
            finally:  # the three hold each other, and would wait for the garbage collector
                del request.scheduler.step
                self._pipe = None

    def _after_step(self) -> None:
        job = self.job
        steps = getattr(self._pipe, "num_timesteps", None) or len(job.request.scheduler.timesteps)
        job.progress = Progress(job.progress.step + 1, steps)
        if job.request.on_step is not None:
            job.request.on_step(job)
        if job.reason_to_stop() is not None:
            raise Stop


class Running:
    """One request between its start and its end.

    Attributes:
        rows: of the denoiser's batch that the request takes; an estimate until `is_counted`.
        waiting: the call that it waits with, or None before its first.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        job: Job,
        *,
        rows: int,
        adapter_row: int,
        proxies: Mapping[str, nn.Module],
        settings: ThreadSettings,
    ) -> None:
        self.job, self.rows, self.adapter_row = job, rows, adapter_row
        self.is_counted = False
        self.waiting: Waiting | None = None
        self.since = 0
        call = Progressing(job, settings)
        self._coroutine = Coroutine(lambda: call.generate(proxies), "request")

    def advance(self) -> bool:
        """Run until the next call of a model, if the last one is answered, or end if there is a reason to stop.

        Returns:
            whether it ended; the job has its result then.
        """
        if self.job.reason_to_stop() is not None:
            while not self._coroutine.ended:
                self._coroutine.resume(error=Stop())
        elif self.waiting is None:
            self._await(self._coroutine.resume())
        elif self.waiting.done:
            call = self.waiting.call
            self._await(self._coroutine.resume(call.answer, error=call.error))
        if self._coroutine.ended:
            self._finish()
        return self._coroutine.ended

    def _await(self, call: Any) -> None:
        self.waiting = None if call is None else Waiting(call, self.adapter_row)
        self.since = next(self._numbers)

    def _finish(self) -> None:
        self.waiting = None
        error = self._coroutine.error
        if error is None:
            self.job.finish(self._coroutine.result)
            return
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the call
        if isinstance(error, Stop):
            error = self.job.reason_to_stop() or EngineClosed("the engine was closed")
        self.job.finish(error=error)
