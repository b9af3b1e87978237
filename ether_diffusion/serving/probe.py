"""Measure a pipeline's denoiser at several batch sizes, with the arguments of a call of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.serving import checks
from ether_diffusion.serving.coroutines import Coroutine, Stop
from ether_diffusion.serving.joining import BY_ROW, invoke, key_of, kind_of, repeat
from ether_diffusion.serving.measure import Measurement, measure
from ether_diffusion.serving.proxies import Call, copy_for_request
from ether_diffusion.serving.running import ThreadSettings

TYPICAL = {"prompt": "a photograph"}


def measure_pipeline(
    pipe: DiffusionPipeline,
    proxies: Mapping[str, nn.Module],
    settings: ThreadSettings,
    typical: Mapping[str, Any] | None,
) -> Measurement:
    """What a forward of the denoiser costs by its rows.

    typical: arguments of the call whose shapes are measured; default: a prompt, and the pipeline's own size.

    Raises:
        InputError: such a call fails.
    """
    arguments = dict(TYPICAL if typical is None else typical)
    checks.check_arguments(pipe, arguments)
    if checks.takes(pipe, "num_inference_steps"):
        arguments.setdefault("num_inference_steps", 2)
    if checks.takes(pipe, "generator"):
        arguments.setdefault("generator", torch.Generator().manual_seed(0))
    with settings.entered():
        call = _first_denoising(pipe, proxies, settings, arguments)
        kind = kind_of(call.function)
        if call.bound is None or key_of(kind, call.bound) is None:
            known = ", ".join(name for name in BY_ROW if "UNet" in name or "Transformer" in name)
            return Measurement({}, 1, remark=f"calls of {kind} are not joined; those of {known} are")
        return measure(lambda rows: invoke(call.function, repeat(kind, call.bound, rows)), settings.device)


def _first_denoising(
    pipe: DiffusionPipeline, proxies: Mapping[str, nn.Module], settings: ThreadSettings, arguments: Mapping[str, Any]
) -> Call:
    """The first call of the denoiser that a pipeline's call makes; the rest of it is not run."""

    def generate() -> None:
        with settings.entered():
            copy_for_request(pipe, proxies, copy.deepcopy(pipe.scheduler), lambda: None)(**arguments)

    coroutine = Coroutine(generate, "probe")
    call = coroutine.resume()
    while call is not None and not call.component.startswith(checks.DENOISERS):
        try:
            answer, error = call.function(*call.args, **call.kwargs), None
        except Exception as failed:
            answer, error = None, failed
        call = coroutine.resume(answer, error=error)
    while not coroutine.ended:
        coroutine.resume(error=Stop())
    if call is None:
        raise InputError(
            f"max_batch='auto': a call to measure did not reach the denoiser ({coroutine.error!r}); pass a number, or "
            "arguments that the pipeline needs as typical="
        ) from coroutine.error
    return call
