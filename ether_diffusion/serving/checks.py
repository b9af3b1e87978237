"""Which pipelines and arguments the engine takes; what it cannot do is refused before anything runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ether_diffusion.adapters.per_prompt import SCALES
from ether_diffusion.control.pipelines import is_number
from ether_diffusion.errors import InputError

DENOISERS = ("unet", "transformer", "prior", "decoder")
"""The components that a pipeline denoises with, by name."""
DEPRECATED = ("callback", "callback_steps")
"""Arguments that pipelines take without a parameter of that name."""
CHANGES_THE_MODEL = {
    "set_pag_applied_layers": "perturbed attention guidance exchanges attention processors during a call",
}


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline whose models are not as they were loaded, or that moves them while it runs.

    Raises:
        InputError: names the component, and what to do.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise InputError(f"a {type(pipe).__name__} has no scheduler: the engine serves diffusion pipelines")
    if within := [name for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)]:
        raise InputError(f"{type(pipe).__name__} is made of pipelines ({', '.join(within)}): serve one of them")
    for attribute, why in CHANGES_THE_MODEL.items():
        if hasattr(pipe, attribute):
            raise InputError(f"{type(pipe).__name__}: {why}, which requests beside it would see")
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            _check_model(name, model)
    for name, record in pipe.ether_adapters.items():
        if record.replaced or record.control:
            what = "replaced modules" if record.replaced else "a control encoder"
            raise InputError(f"the pipeline holds {what} of the adapter {name!r}: unload_ether_weights first")


def _check_model(name: str, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            what = "a fused adapter: unfuse it and" if module.merged else "an adapter attached:"
            raise InputError(f"{name} has {what} unload it; the engine gives each request its own")
        if hasattr(module, "_hf_hook"):
            raise InputError(f"{name} is offloaded, and would be moved for each request: put the pipeline on a device")
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            hooks = ", ".join(registry.hooks)
            raise InputError(f"{name} has hooks that keep state between calls ({hooks}): disable offload and caching")
    if isinstance(model, PeftModel | PeftMixedModel):
        raise InputError(f"{name} is a {type(model).__name__}: put its base model there")


def check_arguments(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not know, and those that are the engine's to give.

    Raises:
        InputError: names the argument, and says what fits.
    """
    known = parameters_of(pipe)
    if unknown := sorted(set(arguments) - set(known) - set(DEPRECATED)):
        raise InputError(
            f"{', '.join(unknown)}: {type(pipe).__name__} takes no such argument; it takes {', '.join(known)}"
        )
    for name in SCALES:
        if isinstance(given := arguments.get(name), Mapping) and given.get("scale", 1.0) != 1.0:
            raise InputError(
                f"{name}: scale={given['scale']!r}; an adapter's strength is given as adapter={{name: …}}"
            )
    for name in ("guidance_scale", "num_inference_steps"):
        value = arguments.get(name)
        if value is not None and not is_number(value):
            raise InputError(f"{name}={value!r}: a finite number fits")


def check_seeds(pipe: DiffusionPipeline, arguments: Mapping[str, Any], seed: Any) -> None:
    """Refuse what is no seed, a seed beside generators, and a seed where the pipeline takes no generator.

    Raises:
        InputError: says what arrived.
    """
    if seed is None:
        return
    seeds = seed if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    if not seeds or any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in seeds):
        raise InputError(f"seed={seed!r}: an integer from 0, or one for each image, fits")
    if any(each >= 2**63 for each in seeds):
        raise InputError(f"seed={seed!r}: an integer below 2**63 fits")
    if arguments.get("generator") is not None:
        raise InputError("seed and generator are two ways to say one thing: pass one")
    if not takes(pipe, "generator"):
        raise InputError(f"seed: {type(pipe).__name__} takes no generator")


def takes(pipe: DiffusionPipeline, argument: str) -> bool:
    """Whether a pipeline's call takes an argument."""
    return argument in parameters_of(pipe)


def parameters_of(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name, also those that it passes on to the class that it derives from."""
    return call_parameters(type(pipe))


@functools.cache
def call_parameters(kind: type[DiffusionPipeline]) -> dict[str, inspect.Parameter]:
    """`parameters_of` for a class of pipelines."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__call__" in vars(base):
            for name, each in inspect.signature(base.__call__).parameters.items():
                if name != "self" and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
                    found.setdefault(name, each)
    return found


def check_count(name: str, value: Any, *, or_else: str = "") -> None:
    """Raises InputError for what is no positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r}: a positive whole number{or_else} fits")


def check_timeout(timeout: Any) -> None:
    """Raises InputError for what is no positive number of seconds."""
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise InputError(f"timeout={timeout!r}: a positive number of seconds, or None, fits")


def strengths_of(adapter: str | Mapping[str, float] | None) -> dict[str, float]:
    """Name -> strength of what was asked for as one name, as names with strengths, or as None.

    Raises:
        InputError: says what arrived.
    """
    if adapter is None:
        return {}
    chosen = {adapter: 1.0} if isinstance(adapter, str) else adapter
    if not isinstance(chosen, Mapping) or not all(isinstance(name, str) for name in chosen):
        raise InputError(f"adapter={adapter!r}: a name, names with strengths such as {{'dog': 0.8}}, or None fits")
    for name, strength in chosen.items():
        if not is_number(strength):
            raise InputError(f"adapter {name!r}: strength {strength!r}; a finite number fits")
    return dict(chosen)


def count_images(arguments: Mapping[str, Any]) -> int:
    """How many images a call asks for."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, list | tuple):
        prompts = len(prompt)
    elif isinstance(embeds, torch.Tensor) or (isinstance(embeds, Iterable) and prompt is None):
        prompts = len(embeds)
    else:
        prompts = 1
    return max(1, prompts) * (arguments.get("num_images_per_prompt") or 1)
