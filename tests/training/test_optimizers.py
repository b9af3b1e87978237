"""Optimisers, parameter groups and schedules: what the options say reaches the steps."""

import importlib.util
import io
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ether_diffusion import EtherLayer
from ether_diffusion.errors import InputError
from ether_diffusion.training.optimizers import (
    check_optimizer,
    check_schedule,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from ether_diffusion.training.options import OptimizationOptions


def given(**options) -> OptimizationOptions:
    return OptimizationOptions(**{"learning_rate": 1e-2, "max_train_steps": 12, **options})


class Bowl(nn.Module):
    """A quadratic whose lowest point is 1 everywhere, with a curvature of its own along each axis."""

    def __init__(self, *shape: int):
        super().__init__()
        self.place = nn.Parameter(torch.linspace(-1, 0.5, math.prod(shape)).reshape(shape))
        self.register_buffer("curvature", torch.linspace(0.5, 2, math.prod(shape)).reshape(shape))

    def forward(self) -> torch.Tensor:
        return (self.curvature * (self.place - 1).square()).mean()


def descend(bowl: nn.Module, optimizer: torch.optim.Optimizer, schedule=None, *, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        bowl().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def through_a_file(state: object) -> object:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def optimizer_of(bowl: nn.Module, options: OptimizationOptions) -> torch.optim.Optimizer:
    return make_optimizer(parameter_groups({"unet": bowl}, denoiser="unet", options=options), options)


# Before anything is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": "prodigy"},
            '--optimizer prodigy: prodigyopt is not installed; pip install "ether-diffusion[prodigy]"',
        ),
        (
            {"use_8bit_adam": True},
            '--use_8bit_adam: bitsandbytes is not installed; pip install "ether-diffusion[bitsandbytes]"',
        ),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, options, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        check_optimizer(OptimizationOptions(**options))
    assert str(caught.value) == message


def test_adamw_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer(OptimizationOptions(text_encoder_lr=1e-4))


@pytest.mark.parametrize("rate", [None, 0.5])
def test_prodigy_takes_one_learning_rate(monkeypatch, rate):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    one = 1.0 if rate is None else rate
    check_optimizer(OptimizationOptions(optimizer="prodigy", learning_rate=rate))
    check_optimizer(OptimizationOptions(optimizer="prodigy", learning_rate=rate, text_encoder_lr=one))
    with pytest.raises(InputError, match=rf"^--text_encoder_lr: got 0.25, .* takes one .* is {one:g}; drop it"):
        check_optimizer(OptimizationOptions(optimizer="prodigy", learning_rate=rate, text_encoder_lr=0.25))


# Parameter groups -----------------------------------------------------------------------------------------------


def test_the_text_encoders_have_a_group_of_their_own_rate_behind_the_denoisers(trained):
    models = {"text_encoder": trained.text_encoder, "unet": trained.unet}
    first, second = parameter_groups(models, denoiser="unet", options=given(text_encoder_lr=1e-3))
    assert (first["lr"], second["lr"]) == (1e-2, 1e-3)
    for group, model in ((first, trained.unet), (second, trained.text_encoder)):
        vectors = [each for layer in model.modules() if isinstance(layer, EtherLayer) for each in vectors_of(layer)]
        assert vectors and set(group["params"]) == set(vectors)


def vectors_of(layer: EtherLayer) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("rate", [None, 1e-2])
def test_one_rate_is_one_group(rate):
    models = {"unet": Bowl(3), "text_encoder": Bowl(2), "text_encoder_2": Bowl(1)}
    (group,) = parameter_groups(models, denoiser="unet", options=given(text_encoder_lr=rate))
    assert [len(each) for each in group["params"]] == [3, 2, 1] and group["lr"] == 1e-2


def test_a_frozen_text_encoder_has_no_group():
    models = {"unet": Bowl(3), "text_encoder": Bowl(2).requires_grad_(False)}
    (group,) = parameter_groups(models, denoiser="unet", options=given(text_encoder_lr=1.0))
    assert group["lr"] == 1e-2


def test_nothing_to_train_is_an_error_that_names_the_models():
    models = {"unet": Bowl(3).requires_grad_(False), "text_encoder": Bowl(2).requires_grad_(False)}
    with pytest.raises(ValueError, match="^nothing to train: no parameter of unet, text_encoder requires gradients"):
        parameter_groups(models, denoiser="unet", options=given())


def test_a_learning_rate_that_is_not_resolved_is_an_error():
    with pytest.raises(ValueError, match="learning_rate is not resolved"):
        parameter_groups({"unet": Bowl(1)}, denoiser="unet", options=OptimizationOptions())


# AdamW ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "learning_rate": (5e-2, {"lr": 5e-2}),
    "adam_beta1": (0.5, {"betas": (0.5, 0.999)}),
    "adam_beta2": (0.9, {"betas": (0.9, 0.9)}),
    "adam_weight_decay": (0.3, {"weight_decay": 0.3}),
    "adam_epsilon": (1e-1, {"eps": 1e-1}),
}
TORCH_DEFAULTS = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}


@pytest.mark.parametrize("name", SETTINGS)
def test_adamw_takes_the_steps_of_torchs_with_every_setting(name):
    value, setting = SETTINGS[name]
    ours, theirs, plain = Bowl(4, 3), Bowl(4, 3), Bowl(4, 3)
    descend(ours, optimizer_of(ours, given(**{name: value})), steps=5)
    descend(theirs, torch.optim.AdamW(theirs.parameters(), **(TORCH_DEFAULTS | setting)), steps=5)
    descend(plain, optimizer_of(plain, given()), steps=5)
    assert torch.equal(ours.place, theirs.place)
    assert not torch.equal(ours.place, plain.place)  # the setting has an effect


def test_each_group_steps_with_its_own_rate():
    models = {"unet": Bowl(4), "text_encoder": Bowl(4)}
    start = models["unet"].place.detach().clone()
    options = given(text_encoder_lr=1e-3)
    optimizer = make_optimizer(parameter_groups(models, denoiser="unet", options=options), options)
    for model in models.values():
        model().backward()
    optimizer.step()
    # The first step of Adam has the size of the learning rate, whatever the gradient.
    for model, rate in (("unet", 1e-2), ("text_encoder", 1e-3)):
        torch.testing.assert_close(models[model].place - start, torch.full((4,), rate), rtol=1e-3, atol=0)


def test_the_groups_that_were_given_stay_as_they_are():
    groups = parameter_groups({"unet": Bowl(3)}, denoiser="unet", options=given())
    make_optimizer(groups, given())
    assert [set(group) for group in groups] == [{"params", "lr", "name"}]


# Prodigy and 8-bit AdamW ----------------------------------------------------------------------------------------

PRODIGY = pytest.param("prodigyopt", {"optimizer": "prodigy", "learning_rate": 1.0}, (4, 3), id="prodigy")
EIGHT_BITS = pytest.param(
    "bitsandbytes", {"use_8bit_adam": True, "learning_rate": 3e-2}, (64, 96), marks=pytest.mark.slow, id="8-bit adamw"
)  # large enough for moments in 8 bits
EXTRAS = pytest.mark.parametrize(("package", "options", "shape"), [PRODIGY, EIGHT_BITS])


def need(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")


@EXTRAS
def test_an_optional_optimizer_finds_the_lowest_point(package, options, shape):
    need(package)
    bowl, options = Bowl(*shape), given(**options)
    check_optimizer(options)
    before = bowl().item()
    descend(bowl, optimizer_of(bowl, options), steps=200)
    assert bowl().item() < 1e-2 * before


@EXTRAS
@pytest.mark.parametrize("name", [each for each in SETTINGS if each != "learning_rate"])
def test_settings_reach_an_optional_optimizer(capsys, package, options, shape, name):
    need(package)
    bowl, plain = Bowl(*shape), Bowl(*shape)
    value, setting = SETTINGS[name]
    optimizer = optimizer_of(bowl, given(**options, **{name: value}))
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in setting} == setting
    descend(bowl, optimizer, steps=20)
    descend(plain, optimizer_of(plain, given(**options)), steps=20)
    assert not torch.equal(bowl.place, plain.place)
    assert not capsys.readouterr().out


def test_prodigy_corrects_its_bias_decouples_its_decay_and_minds_a_warm_up():
    need("prodigyopt")
    (group,) = optimizer_of(Bowl(3), given(optimizer="prodigy", learning_rate=1.0)).param_groups
    assert group["lr"] == 1 and group["decouple"] and group["use_bias_correction"] and group["safeguard_warmup"]


@pytest.mark.slow
def test_8_bit_adamw_keeps_one_byte_per_moment_and_stays_near_torchs_adamw():
    need("bitsandbytes")
    ours, theirs = Bowl(64, 96), Bowl(64, 96)
    optimizer = optimizer_of(ours, given(use_8bit_adam=True, adam_weight_decay=0.1))
    descend(ours, optimizer, steps=20)
    descend(theirs, optimizer_of(theirs, given(adam_weight_decay=0.1)), steps=20)
    state = optimizer.state[ours.place]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert (ours.place - theirs.place).abs().mean() < 0.05 * 20 * 1e-2  # of the way that 20 steps can go


@EXTRAS
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_run_with_an_optional_optimizer_goes_on_to_the_bit(package, options, shape, warmup):
    need(package)
    options = given(**options, lr_scheduler="cosine", lr_warmup_steps=warmup)

    def start():
        bowl = Bowl(*shape)
        optimizer = optimizer_of(bowl, options)
        return bowl, optimizer, make_schedule(optimizer, options)

    whole, optimizer, schedule = start()
    descend(whole, optimizer, schedule, steps=12)
    for stop in (1, 6):
        first, optimizer, schedule = start()
        descend(first, optimizer, schedule, steps=stop)
        saved = through_a_file([each.state_dict() for each in (first, optimizer, schedule)])
        second, optimizer, schedule = start()
        optimizer = Accelerator(cpu=True).prepare(optimizer)  # as in the loop, which loads into the one inside
        for part, state in zip((second, optimizer.optimizer, schedule), saved, strict=True):
            part.load_state_dict(state)
        descend(second, optimizer, schedule, steps=12 - stop)
        assert torch.equal(second.place, whole.place)


# Schedules ------------------------------------------------------------------------------------------------------


def rates(steps: int = 12, **options) -> list[list[float]]:
    """The learning rates of every group, for each step of a run."""
    options = given(max_train_steps=steps, **options)
    models = {"unet": Bowl(2), "text_encoder": Bowl(2)}
    optimizer = make_optimizer(parameter_groups(models, denoiser="unet", options=options), options)
    schedule, seen = make_schedule(optimizer, options), []
    for _ in range(steps):
        seen.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return seen


def rising(warmup: int, decay):
    """A closed formula: from 0 in a straight line, then `decay` of how much is behind."""
    return lambda step, steps: step / warmup if step < warmup else decay((step - warmup) / (steps - warmup))


COURSES = {
    "constant": ({}, lambda step, steps: 1.0),
    "constant_with_warmup": ({"lr_warmup_steps": 4}, rising(4, lambda done: 1.0)),
    "linear": ({"lr_warmup_steps": 3}, rising(3, lambda done: 1 - done)),
    "cosine": ({"lr_warmup_steps": 2}, rising(2, lambda done: (1 + math.cos(math.pi * done)) / 2)),
    "cosine_with_restarts": (
        {"lr_warmup_steps": 2, "lr_num_cycles": 2},
        rising(2, lambda done: (1 + math.cos(math.pi * (2 * done % 1))) / 2),
    ),
    "polynomial": ({"lr_warmup_steps": 2, "lr_power": 2.0}, rising(2, lambda done: (1 - done) ** 2)),
}


@pytest.mark.parametrize("name", COURSES)
def test_the_learning_rate_follows_the_closed_formula(name):
    options, course = COURSES[name]
    factors = torch.tensor([course(step, 12) for step in range(12)])
    seen = torch.tensor(rates(lr_scheduler=name, text_encoder_lr=1e-3, **options)).T
    # The polynomial ends at 1e-7 in place of 0.
    torch.testing.assert_close(seen, torch.tensor([[1e-2], [1e-3]]) * factors, rtol=1e-4, atol=2e-7)


def test_two_cycles_start_at_the_plateau_twice():
    seen = [rate for (rate,) in rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)]
    assert [step for step, rate in enumerate(seen) if rate == 1e-2] == [0, 6]


def test_without_a_number_of_steps_the_schedule_ends_with_the_default_run():
    options = OptimizationOptions(learning_rate=1.0, lr_scheduler="linear")
    schedule = make_schedule(optimizer_of(Bowl(2), options), options)
    assert schedule.lr_lambdas[0](options.steps - 1) == pytest.approx(1 / options.steps)


@pytest.mark.parametrize("name", [name for name in COURSES if name != "constant"])
@pytest.mark.parametrize("warmup", [12, 20])
def test_a_run_may_end_within_its_warm_up(name, warmup):
    seen = [rate for (rate,) in rates(lr_scheduler=name, lr_warmup_steps=warmup)]
    assert seen == pytest.approx([1e-2 * step / warmup for step in range(12)])


def test_a_learning_rate_below_the_end_of_the_polynomial_is_an_error():
    with pytest.raises(InputError, match="^--learning_rate: got 1e-08, needs more than 1e-07, where --lr_scheduler"):
        check_schedule(given(lr_scheduler="polynomial", learning_rate=1e-8))
