"""A pipeline's copy for one request, whose models hand their calls to the engine.

A proxy is the model itself, its class derived from the model's and its `__dict__` the model's own, so that everything
that a pipeline asks of a model (class, config, dtype, submodules) is as ever; only calling it is different.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import BoundArguments, Signature
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.serving.coroutines import Coroutine
from ether_diffusion.serving.joining import uncompiled

CODECS = ("decode", "encode")
"""Methods of autoencoders, which pipelines call in place of the model."""
STATEFUL = ("set_attn_processor", "register_forward_hook", "register_forward_pre_hook")
"""What would change the model for the requests beside."""


@dataclass(eq=False)
class Call:
    """A model's call that a request waits for.

    component: the model's first name in the pipeline.
    function: the model itself, or one of its methods.
    bound: the arguments by name; None where the model is called alone, whatever they are.
    """

    component: str
    function: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    bound: BoundArguments | None = None
    answer: Any = field(default=None, repr=False)
    error: BaseException | None = None


def make_proxies(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """A proxy for every component that is a model, by name; one for both names where a model has two."""
    first: dict[int, str] = {}
    made: dict[str, nn.Module] = {}
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            component = first.setdefault(id(model), name)
            made[name] = made[component] if component in made else _proxy(component, model)
    return made


def _proxy(component: str, model: nn.Module) -> nn.Module:
    kind = type(model)
    signature = _signature(model)

    def call(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _ask(Call(component, model, args, kwargs, signature and signature.bind(*args, **kwargs)))

    def method(name: str) -> Callable:
        own = getattr(model, name)

        @functools.wraps(getattr(kind, name))
        def ask(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _ask(Call(component, own, args, kwargs))

        return ask

    members: dict[str, Any] = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members |= {name: method(name) for name in CODECS if callable(getattr(kind, name, None))}
    members |= {name: _refusal(component, name) for name in STATEFUL if hasattr(kind, name)}
    proxy = object.__new__(type(kind.__name__, (kind,), members))
    object.__setattr__(proxy, "__dict__", model.__dict__)
    return proxy


def _signature(model: nn.Module) -> Signature | None:
    """By which a model's arguments get their names; None where some of them have none."""
    signature = inspect.signature(uncompiled(model).forward)
    nameless = any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())
    return None if nameless else signature


def _ask(call: Call) -> Any:
    coroutine = Coroutine.current()
    if coroutine is None:
        raise RuntimeError(f"{call.component} was called outside of its request: the engine has ended it")
    return coroutine.pause(call)


def _refusal(component: str, name: str) -> Callable:
    def refuse(_self: nn.Module, *_args: Any, **_kwargs: Any) -> None:
        raise InputError(
            f"{component}.{name}: this pipeline changes the model while it generates, which the requests beside it "
            "would see: call the pipeline itself"
        )

    return refuse


def copy_for_request(
    pipe: DiffusionPipeline, proxies: Mapping[str, nn.Module], scheduler: Any, after_step: Callable[[], None]
) -> DiffusionPipeline:
    """A shallow copy of a pipeline, with proxies for its models, no progress bar, and this scheduler.

    scheduler: nobody else's; changed here.
    after_step: called after every step of the scheduler.
    """
    clone = copy.copy(pipe)
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        after_step()
        return result

    scheduler.step = counted
    # Past the pipeline's own __setattr__, which would write into the config that the copies share.
    clone.__dict__ |= {name: proxy for name, proxy in proxies.items() if name in clone.__dict__}
    clone.__dict__ |= {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
    return clone
