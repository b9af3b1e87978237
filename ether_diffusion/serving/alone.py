"""Requests that change the models while they run, such as those with a control image: nothing runs beside them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from diffusers import DiffusionPipeline

from ether_diffusion.adapters.attach import attach, detach
from ether_diffusion.adapters.schema import AdapterFile
from ether_diffusion.adapters.strength import set_adapters
from ether_diffusion.serving.coroutines import Stop
from ether_diffusion.serving.job import Job
from ether_diffusion.serving.running import Progressing, ThreadSettings

PREFIX = "request_"
"""Of the names of adapters while they are on the pipeline: PyTorch has attributes of its own under some."""


def run_alone(job: Job, settings: ThreadSettings) -> None:
    """Run a request on this thread, with its adapters on the pipeline itself; afterwards they are off again.

    The job has its result then.
    """
    pipe, files = job.request.pipe, job.request.adapters
    names = [f"{PREFIX}{k}" for k in range(len(files))]
    function = job.request.function

    def generate() -> object:
        return Progressing(job, settings).generate({}) if function is None else function(pipe)

    try:
        result = _with_adapters(pipe, names, files, generate)
    except Stop:
        job.finish(error=job.reason_to_stop())
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the call
        job.finish(error=error)
    else:
        job.finish(result)


def _with_adapters(
    pipe: DiffusionPipeline,
    names: Sequence[str],
    files: Sequence[tuple[AdapterFile, float]],
    generate: Callable[[], object],
) -> object:
    attached = []
    try:
        for name, (file, _) in zip(names, files, strict=True):
            attach(pipe, file, name)
            attached.append(name)
        if names:
            set_adapters(pipe, names, [strength for _, strength in files])
        return generate()
    finally:
        detach(pipe, attached)
