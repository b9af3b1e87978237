"""What takes the steps, and how large they are: optimisers, parameter groups and the course of the learning rate."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ether_diffusion.errors import InputError
from ether_diffusion.training.options import PRODIGY_LEARNING_RATE, OptimizationOptions

POLYNOMIAL_END = 1e-7
"""Learning rate at which diffusers' polynomial schedule ends."""


def check_optimizer(options: OptimizationOptions) -> None:
    """Make sure, before anything is loaded, that the optimiser can be had and takes the learning rates.

    Raises:
        InputError: its package is missing, or Prodigy is given two learning rates.
    """
    if options.use_8bit_adam:
        _check_installed("--use_8bit_adam", package="bitsandbytes", extra="bitsandbytes")
    if options.optimizer == "prodigy":
        _check_installed("--optimizer prodigy", package="prodigyopt", extra="prodigy")
        rate = PRODIGY_LEARNING_RATE if options.learning_rate is None else options.learning_rate
        if options.text_encoder_lr not in (None, rate):
            raise InputError(
                f"--text_encoder_lr: got {options.text_encoder_lr:g}, --optimizer prodigy takes one learning rate for "
                f"all, which is {rate:g}; drop it"
            )


def _check_installed(flag: str, *, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f'{flag}: {package} is not installed; pip install "ether-diffusion[{extra}]"')


def parameter_groups(
    models: Mapping[str, nn.Module], *, denoiser: str, options: OptimizationOptions
) -> list[dict[str, Any]]:
    """What is trained, in one group per learning rate, with a "name" for people; the denoiser's comes first.

    Args:
        models: everything that may hold trained parameters (those that require gradients), by name.
        denoiser: which of them has `learning_rate`; the others, the text encoders, have `text_encoder_lr`, if given.
        options: with definite learning rates (see `OptimizationOptions.resolve`).

    Raises:
        ValueError: nothing is trained.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name in (denoiser, *(each for each in models if each != denoiser)):
        own = name == denoiser or options.text_encoder_lr is None
        rate = _rate(options) if own else options.text_encoder_lr
        if trained := [each for each in models[name].parameters() if each.requires_grad]:
            groups.setdefault(rate, []).extend(trained)
    if not groups:
        raise ValueError(f"nothing to train: no parameter of {', '.join(models)} requires gradients")
    names = ("denoiser", "text encoder")
    return [
        {"params": parameters, "lr": rate, "name": name}
        for (rate, parameters), name in zip(groups.items(), names, strict=False)
    ]


def make_optimizer(
    groups: Sequence[Mapping[str, Any]], options: OptimizationOptions, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW, AdamW with moments in 8 bits, or Prodigy.

    Every state is of tensors and plain numbers, which `torch.load` reads with weights only.

    Args:
        groups: as `parameter_groups` makes them.
        fused: let AdamW take a step in one operation for many vectors, on the CPU, too; else it is ten for each there.
            Not with gradients that a scaler may find too large: the step would be skipped unseen.
    """
    settings = {
        "lr": _rate(options),  # diffusers' polynomial schedule starts at this one, whatever the groups say
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    groups = [{"params": group["params"], "lr": group["lr"]} for group in groups]  # optimisers write into them
    if options.optimizer == "prodigy":
        from prodigyopt import Prodigy  # an extra

        # Prodigy prints a line about a decay among its defaults; from the groups it takes it in silence.
        decay = settings.pop("weight_decay")
        groups = [{**group, "weight_decay": decay} for group in groups]
        # Bias correction as in Adam. Without the safeguard the small rates of a warm-up spoil the estimate of the step
        # size.
        return Prodigy(groups, decouple=True, use_bias_correction=True, safeguard_warmup=True, **settings)
    if options.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # an extra, and slow to import

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=fused or None, **settings)


def check_schedule(options: OptimizationOptions) -> None:
    """Make sure that the learning rate has room for its course.

    options: with definite learning rates.

    Raises:
        InputError: a learning rate below the end of the polynomial schedule.
    """
    if options.lr_scheduler == "polynomial" and _rate(options) <= POLYNOMIAL_END:
        raise InputError(
            f"--learning_rate: got {options.learning_rate:g}, needs more than {POLYNOMIAL_END:g}, where "
            "--lr_scheduler polynomial ends"
        )


def make_schedule(optimizer: torch.optim.Optimizer, options: OptimizationOptions) -> LRScheduler:
    """The course of the learning rates: one step of it for one of the optimiser.

    options: with definite steps and learning rates, which `check_schedule` has seen.
    """
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        # A run that ends within the warm-up never comes to the decay, but the polynomial divides by its length.
        num_training_steps=max(options.steps, options.lr_warmup_steps + 1),
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )


def _rate(options: OptimizationOptions) -> float:
    """The learning rate. Raises `ValueError` where it is still open (see `OptimizationOptions.resolve`)."""
    if options.learning_rate is None:
        raise ValueError("learning_rate is not resolved to a number")
    return options.learning_rate
