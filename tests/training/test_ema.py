"""The running average: its weights, its place in a checkpoint, and what a model answers with it."""

import io
import math

import pytest
import torch
from torch import nn

from ether_diffusion import EtherConfig
from ether_diffusion.training.ema import RunningAverage
from ether_diffusion.training.optimizers import make_optimizer, parameter_groups
from ether_diffusion.training.options import OptimizationOptions
from ether_diffusion.tuner.attention import enable_ether_attention
from ether_diffusion.tuner.layer import EtherLinear


def walk(seed: int = 0):
    """A parameter in float64, and its places on a random walk."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(30, 5, generator=generator, dtype=torch.float64).cumsum(dim=0)
    return nn.Parameter(places[0].clone()), places


@torch.no_grad()
def follow(average: RunningAverage, parameter: nn.Parameter, places: torch.Tensor) -> None:
    for place in places:
        parameter.copy_(place)
        average.update()


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.999])
def test_the_average_weighs_every_step_by_the_closed_formula(decay):
    parameter, places = walk()
    average = RunningAverage([parameter], decay)
    follow(average, parameter, places[1:])
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(29)]
    weights = [math.prod(decays)] + [(1 - each) * math.prod(decays[t + 1 :]) for t, each in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(average.shadow_params[0], torch.tensor(weights, dtype=torch.float64) @ places)
    assert torch.equal(parameter, places[-1])


def test_the_average_goes_on_to_the_bit():
    whole, places = walk()
    expected = RunningAverage([whole], 0.9)
    follow(expected, whole, places)
    first, _ = walk()
    average = RunningAverage([first], 0.9)
    follow(average, first, places[:11])
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved.keys() == {"average", "updates"}  # as in training checkpoints of all releases
    second = nn.Parameter(first.detach().clone())
    resumed = RunningAverage([second], 0.9)
    resumed.load_state_dict(saved)
    follow(resumed, second, places[11:])
    assert torch.equal(resumed.shadow_params[0], expected.shadow_params[0])


def test_an_average_of_other_parameters_is_an_error():
    state = RunningAverage([nn.Parameter(torch.zeros(3))], 0.9).state_dict()
    with pytest.raises(ValueError, match=r"its shapes are \[\(3,\)\], those trained \[\(2,\), \(3,\)\]"):
        RunningAverage([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))], 0.9).load_state_dict(state)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_average_is_applied_for_the_time_of_the_context(error):
    parameter, places = walk()
    parameter.data[0] = float("nan")  # not even this is lost
    places[3, 0] = float("nan")
    average = RunningAverage([parameter], 0.9)
    follow(average, parameter, places[1:4])
    before, held = parameter.detach().clone(), average.shadow_params[0].clone()
    try:
        with average.applied():
            torch.testing.assert_close(parameter.detach(), held, rtol=0, atol=0, equal_nan=True)
            assert torch.is_grad_enabled()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert torch.equal(parameter.view(torch.int64), before.view(torch.int64))
    assert torch.equal(average.shadow_params[0].view(torch.int64), held.view(torch.int64))


def test_the_average_stays_for_good_once_applied():
    parameter, places = walk()
    average = RunningAverage([parameter], 0.9)
    follow(average, parameter, places)
    average.apply()
    assert torch.equal(parameter, average.shadow_params[0]) and not torch.equal(parameter, places[-1])
    assert parameter.requires_grad and parameter.is_leaf


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_a_layer_answers_with_its_average_and_then_as_before(method):
    torch.manual_seed(0)
    layer = EtherLinear(nn.Linear(8, 8), "default", EtherConfig(method=method, num_blocks=2, init_weights=False))
    layer.base_layer.requires_grad_(False)
    x, goal = torch.randn(5, 8), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    average = RunningAverage([each for each in layer.parameters() if each.requires_grad], 0.999)
    for _ in range(4):
        optimizer.zero_grad()
        (layer(x) - goal).square().mean().backward()
        optimizer.step()
        average.update()
    with torch.no_grad():
        before = layer(x)
        with average.applied():
            inside = layer(x)
        assert not torch.equal(inside, before) and torch.equal(layer(x), before)
        average.apply()
        assert torch.equal(layer(x), inside)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_attention_answers_by_the_weights_of_the_last_step_and_of_the_average(tiny_pipeline, optimizer, full):
    """Prodigy and the average write to parameters past autograd: nothing may be kept from before."""
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt", reason="prodigyopt is not installed")
    unet = tiny_pipeline.unet
    unet.add_adapter(EtherConfig(method="ether", init_weights=False))
    if full:  # the weights below the adapters as well
        unet.requires_grad_(True)
    rate = 1.0 if optimizer == "prodigy" else 0.05
    options = OptimizationOptions(learning_rate=rate, optimizer=optimizer, max_train_steps=12)
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": torch.randn(1, 7, 16)}

    @torch.no_grad()
    def answer() -> torch.Tensor:
        return unet.eval()(**inputs).sample

    enable_ether_attention(unet)
    groups = parameter_groups({"unet": unet}, denoiser="unet", options=options)
    steps, average = make_optimizer(groups, options), RunningAverage(groups[0]["params"], 0.999)
    answers = [answer()]
    for _ in range(2):
        unet(**inputs).sample.square().mean().backward()
        steps.step()
        average.update()
        answers.append(answer())
    with average.applied():
        answers.append(answer())
    answers.append(answer())
    assert torch.equal(answers[-1], answers[2]) and not torch.equal(answers[-2], answers[-1])
    enable_ether_attention(unet)  # new processors, which have seen nothing
    torch.testing.assert_close(answer(), answers[-1], rtol=0, atol=0)
