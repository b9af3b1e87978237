"""How long and with which steps a model is trained."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import (
    ABOVE_ZERO,
    BELOW_ONE,
    FROM_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    OptionGroup,
    option,
)
from ether_diffusion.training.options.model import LEARNING_RATES

DEFAULT_STEPS = 200
PRODIGY_LEARNING_RATE = 1.0
"""Prodigy finds the size of its steps itself; the learning rate only scales it."""

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "prodigy")


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(OptionGroup):
    """optimisation"""

    default_steps: ClassVar[int] = DEFAULT_STEPS

    max_train_steps: int | None = option(
        f"Optimiser steps in all. Default: {DEFAULT_STEPS}, or as many as --num_train_epochs needs.",
        None,
        fits=POSITIVE,
    )
    num_train_epochs: int | None = option(
        "In place of --max_train_steps: how often the training goes through all images.",
        None,
        fits=POSITIVE,
        without="max_train_steps",
    )
    train_batch_size: int = option("Images per process and forward pass.", 4, fits=POSITIVE)
    gradient_accumulation_steps: int = option("Forward passes per optimiser step.", 1, fits=POSITIVE)
    learning_rate: float | None = option(
        "Step size of the optimiser. Default by method: "
        + ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
        + f"; with --optimizer prodigy {PRODIGY_LEARNING_RATE:g}.",
        None,
        fits=ABOVE_ZERO,
    )
    text_encoder_lr: float | None = option(
        "Learning rate of the text encoders. Default: --learning_rate.", None, fits=ABOVE_ZERO
    )
    scale_lr: bool = option(
        "Multiply the learning rates by accumulation steps, batch size and number of processes.", False
    )
    lr_scheduler: str = option("Course of the learning rate.", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option(
        "Optimiser steps over which the learning rate rises from 0 (every --lr_scheduler but constant).",
        0,
        fits=NOT_NEGATIVE,
    )
    lr_num_cycles: int = option(
        "Restarts of --lr_scheduler cosine_with_restarts.",
        1,
        fits=POSITIVE,
        needs="lr_scheduler cosine_with_restarts",
    )
    lr_power: float = option(
        "Power of --lr_scheduler polynomial.", 1.0, fits=ABOVE_ZERO, needs="lr_scheduler polynomial"
    )
    optimizer: str = option("adamw, or prodigy, which finds its step size itself.", "adamw", choices=OPTIMIZERS)
    use_8bit_adam: bool = option(
        "AdamW with moments in 8 bits (bitsandbytes; tensors below 4,096 values keep 32 bits).",
        False,
        without="optimizer prodigy",
    )
    adam_beta1: float = option("Decay of the first moment.", 0.9, fits=BELOW_ONE)
    adam_beta2: float = option("Decay of the second moment.", 0.999, fits=BELOW_ONE)
    adam_weight_decay: float = option(
        "Weight decay. Default 0: the length of a hyperplane's normal has no effect on the model, so decay would only "
        "raise the effective learning rate.",
        0.0,
        fits=FROM_ZERO,
    )
    adam_epsilon: float = option("Term that keeps the optimiser's division finite.", 1e-8, fits=ABOVE_ZERO)
    max_grad_norm: float = option("Gradients are clipped to this norm over all that is trained.", 1.0, fits=ABOVE_ZERO)
    snr_gamma: float | None = option(
        "Weigh each timestep's loss by min(SNR, gamma)/SNR, for v targets by min(SNR, gamma)/(SNR + 1) "
        "(arXiv:2303.09556); 5 is usual.",
        None,
        fits=ABOVE_ZERO,
    )
    noise_offset: float = option(
        "Size of a random shift of each channel's noise, which helps dark and bright images; 0.1 is usual.",
        0.0,
        fits=FROM_ZERO,
    )
    use_ema: bool = option(
        "Save and generate the running average of what is trained in place of its last value.", False
    )
    ema_decay: float = option(
        "Largest decay of the average; it rises from 0.1.", 0.999, fits=BELOW_ONE, needs="use_ema"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise InputError(
                f"--lr_warmup_steps: got {self.lr_warmup_steps}, has no effect with --lr_scheduler constant; "
                "use constant_with_warmup"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps in all. Raises `ValueError` where they are given as epochs (see `resolve`)."""
        if self.num_train_epochs is not None:
            raise ValueError("num_train_epochs is not resolved to a number of steps")
        return self.default_steps if self.max_train_steps is None else self.max_train_steps

    def samples_per_step(self, processes: int) -> int:
        """Images that one optimiser step sees, over all processes."""
        return self.gradient_accumulation_steps * self.train_batch_size * processes

    def resolve(self, *, default_learning_rate: float, epoch_samples: int, processes: int) -> "OptimizationOptions":
        """The same options with the number of steps and the learning rates that they come to.

        Args:
            default_learning_rate: of the method.
            epoch_samples: images in one epoch.
            processes: number of processes.
        """
        per_step = self.samples_per_step(processes)
        steps = self.max_train_steps or self.default_steps
        if self.num_train_epochs is not None:
            steps = math.ceil(self.num_train_epochs * epoch_samples / per_step)
        default = PRODIGY_LEARNING_RATE if self.optimizer == "prodigy" else default_learning_rate
        factor = per_step if self.scale_lr else 1
        rate = (default if self.learning_rate is None else self.learning_rate) * factor
        encoder_rate = None if self.text_encoder_lr is None else self.text_encoder_lr * factor
        return dataclasses.replace(
            self,
            max_train_steps=steps,
            num_train_epochs=None,
            learning_rate=rate,
            text_encoder_lr=encoder_rate,
            scale_lr=False,
        )
