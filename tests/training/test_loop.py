"""The loop on an objective of one number: samples, accumulation, learning rates and losses that are not finite."""

import pytest
import torch
from accelerate import Accelerator
from helpers.scripts import reset_accelerate
from torch.utils._python_dispatch import TorchDispatchMode

from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.objectives import sample_losses
from ether_diffusion.training.options import OptimizationOptions


def test_losses_of_different_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="prediction has shape"):
        sample_losses(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))


class Quadratic(torch.nn.Module):
    """Sample s pulls the weight towards s mod 2; remembers which samples it saw."""

    def __init__(self, broken_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.broken_at = broken_at

    def forward(self, samples):
        self.seen.append(list(samples))
        goals = torch.tensor([float(s % 2) for s in samples])
        loss = (self.weight - goals).square()
        return loss * float("nan") if self.broken_at in samples else loss


def run(objective, **options):
    options = OptimizationOptions(learning_rate=0.1, **options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.gradient_accumulation_steps)
    return Trainer(accelerator, objective, [{"params": [objective.weight], "lr": 0.1}], options).train()


def test_the_loop_visits_every_sample_once_and_converges():
    objective = Quadratic()
    result = run(objective, max_train_steps=60, train_batch_size=4)
    assert objective.seen == [list(range(4 * k, 4 * k + 4)) for k in range(60)]
    assert len(result.losses) == 60 and objective.weight.item() == pytest.approx(0.5, abs=0.05)


def test_accumulation_is_a_larger_batch():
    whole, parts = Quadratic(), Quadratic()
    first = run(whole, max_train_steps=5, train_batch_size=6)
    reset_accelerate()
    second = run(parts, max_train_steps=5, train_batch_size=2, gradient_accumulation_steps=3)
    assert sum(parts.seen, []) == sum(whole.seen, [])
    assert second.losses == pytest.approx(first.losses) and parts.weight.item() == pytest.approx(whole.weight.item())


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step():
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3 of 9"):
        run(Quadratic(broken_at=5), max_train_steps=9, train_batch_size=2)


def test_warm_up_lets_the_learning_rate_rise():
    slow, fast = Quadratic(), Quadratic()
    run(slow, max_train_steps=4, lr_scheduler="constant_with_warmup", lr_warmup_steps=100)
    reset_accelerate()
    run(fast, max_train_steps=4)
    assert slow.weight.item() < 0.1 * fast.weight.item()


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor: each time, a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_device_is_waited_for_once_a_step():
    with Reads() as reads:
        run(Quadratic(), max_train_steps=20, train_batch_size=2)
    assert reads.count == 20 + 1  # and once at the end
