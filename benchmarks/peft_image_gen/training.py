"""Training one adapter as the benchmark does, and what it takes. Axes: b samples, c channels, h and w positions."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from measuring import LiveBytes
from peft import PeftModel, get_peft_model
from torch import Tensor

from ether_diffusion.errors import InputError
from peft_image_gen.model import BenchmarkKlein, Prepared
from peft_image_gen.settings import Experiment

ROUNDS = 1000
"""How often the benchmark shuffles its images before it draws the first noise."""
LEVELS = 1000
LOSSES = 100
"""The last so many steps are those whose mean loss is reported."""


class ReservedBytes:
    """What CUDA's allocator holds of the GPU, in use or not: the figure that the benchmark publishes."""

    def restart(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved()


@dataclass(frozen=True)
class Trained:
    """An adapted model and what its training took.

    parameters: that are trained. loss: mean of the last steps. peak_bytes: of the steps alone. seconds: of the steps.
    """

    model: PeftModel
    parameters: int
    loss: float
    peak_bytes: int
    seconds: float


def train(family: BenchmarkKlein, prepared: Prepared, experiment: Experiment) -> Trained:
    """Adapt a fresh transformer and train the adapter; it stays the pipeline's transformer.

    Loss: the mean of (v̂ − (ε − x))² over samples and values, with σ uniform over the thousand levels of the schedule
    without a shift. Order, noise and levels are the same for every experiment.

    Raises:
        InputError: PEFT cannot adapt the model so, or there are more steps than the benchmark's order has samples for.
    """
    training, device = experiment.training, family.device
    if training.max_steps * training.batch_size > ROUNDS * len(prepared.latents):
        most = ROUNDS * len(prepared.latents) // training.batch_size
        raise InputError(f"{experiment.name}: max_steps is {training.max_steps}, the images are enough for {most}")
    release(family)
    with _counting(device) as meter:
        model = adapt(family, experiment)
        weights = [each for each in model.parameters() if each.requires_grad]
        optimizer = getattr(torch.optim, training.optimizer_type)(weights, **training.optimizer_kwargs)
        draws = torch.Generator(device).manual_seed(family.setting.seed)
        count = len(prepared.latents)
        order = torch.cat([torch.randperm(count, generator=draws, device=device) for _ in range(ROUNDS)])
        levels = torch.Generator().manual_seed(family.setting.seed)
        meter.restart()
        losses, started = [], time.perf_counter()
        for step, chosen in enumerate(order.split(training.batch_size)[: training.max_steps], 1):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(family, prepared, chosen, draws, levels)
            loss.backward()
            if training.grad_norm_clip:
                torch.nn.utils.clip_grad_norm_(weights, training.grad_norm_clip)
            optimizer.step()
            if experiment.config.peft_type == "ADALORA":  # it moves its ranks between layers as it learns
                model.base_model.update_and_allocate(step)
            losses.append(loss.item())  # waits for the device
        seconds, peak = time.perf_counter() - started, meter.peak()
    last = losses[-LOSSES:]
    return Trained(model, sum(each.numel() for each in weights), sum(last) / len(last), peak, seconds)


def adapt(family: BenchmarkKlein, experiment: Experiment) -> PeftModel:
    """The pipeline's transformer with a fresh adapter, in training mode.

    Raises:
        InputError: PEFT cannot adapt it so.
    """
    transformer, training = family.component("transformer"), experiment.training
    if training.use_gc:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(family.setting.seed)  # PEFT's methods draw their start from the global generator
    config = copy.deepcopy(experiment.config)  # which PEFT writes into
    try:
        model = get_peft_model(transformer, config, autocast_adapter_dtype=training.autocast_adapter_dtype)
    except (TypeError, ValueError) as error:
        raise InputError(f"{experiment.name}: PEFT cannot adapt the transformer so ({error})") from error
    family.pipe.transformer = model.to(family.device)
    return model.train()


def release(family: BenchmarkKlein) -> None:
    """Let the transformer go, with the adapter that was on it."""
    family.release("transformer")
    gc.collect()


def _loss(
    family: BenchmarkKlein, prepared: Prepared, chosen: Tensor, draws: torch.Generator, levels: torch.Generator
) -> Tensor:
    latents = prepared.latents[chosen]  # (b, c, h, w)
    noise = torch.randn(latents.shape, generator=draws, device=latents.device, dtype=latents.dtype)
    sigma = 1 - torch.floor(torch.rand(len(chosen), generator=levels) * LEVELS) / LEVELS  # (b,)
    sigma = sigma.to(latents.device)
    noisy = family.noise.add(latents, noise, sigma.to(latents.dtype))
    answer = family.predict(noisy, sigma, [prepared.conditioning[k] for k in chosen.tolist()])
    return (answer.float() - family.noise.target(latents, noise, sigma).float()).square().mean()


@contextlib.contextmanager
def _counting(device: torch.device) -> Iterator[LiveBytes | ReservedBytes]:
    """What counts the memory of all that happens inside; without a GPU, of tensors that are made inside."""
    if device.type == "cuda":
        yield ReservedBytes()
        return
    with LiveBytes() as meter:
        yield meter
