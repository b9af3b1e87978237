"""`pipe.ether_adapters_per_prompt`: a call of a pipeline in which each prompt has an adapter of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ether_diffusion.adapters.components import models_of, named, records_of, tuner_layers
from ether_diffusion.control.pipelines import is_number
from ether_diffusion.tuner.flattened import flattened_modules
from ether_diffusion.tuner.mixed_batch import BASE, Arguments, arguments_by_layer, arguments_of, mixing_layers

Entry = str | tuple[str, float] | None
SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Arguments by which stock pipelines take a scale for all adapters."""
PROMPTS = ("prompt", "prompt_embeds")


@contextmanager
def ether_adapters_per_prompt(self: DiffusionPipeline, adapters: Sequence[Entry]) -> Iterator[None]:
    """Within, the k-th prompt of a call of the pipeline has the k-th of these adapters, and no other.

    `with pipe.ether_adapters_per_prompt(["dog", None, ("cat", 0.6)]): pipe(["…", "…", "…"])`. Which adapters are
    active does not matter, and is as it was afterwards. Each text encoder that carries an adapter encodes a prompt,
    and its negative prompt, with that adapter. The models may be asked for as many rows as there are images, or for
    twice as many where guidance has both halves in one call.

    Args:
        adapters: one entry a prompt: the name of an adapter, at strength 1; name and strength; or None.

    Raises:
        ValueError: an unknown adapter, one with a control encoder or replaced modules, a strength that is no finite
            number or two strengths of one LoRA; fused or disabled adapters; a compiled model. In a call: not one
            entry a prompt, another number of rows, or a scale for all adapters.
    """
    names, strengths = _entries(self, adapters)
    models = {component: model for component, model in models_of(self).items() if tuner_layers(model)}
    layers = {component: mixing_layers(model) for component, model in models.items()}
    _check(self, models)
    loras = _lora_strengths(models, names, strengths)
    images: list[int] = []  # of each prompt, in the call that runs
    with ExitStack() as stack:
        for layer, scales in loras:
            stack.callback(layer.scaling.update, dict(layer.scaling))
            for name, strength in scales.items():
                layer.set_scale(name, strength)
        for component, model in models.items():
            rows = _Rows(component, isinstance(model, PreTrainedModel), names, strengths, images, model)
            stack.callback(model.register_forward_pre_hook(rows.count, with_kwargs=True).remove)
            stack.enter_context(arguments_by_layer(layers[component], rows.arguments))
        stack.enter_context(_calls_checked(self, len(names), images))
        yield


def _entries(pipe: DiffusionPipeline, adapters: Sequence[Entry]) -> tuple[list[str], list[float]]:
    """The name and strength of each entry; `BASE` for none."""
    if isinstance(adapters, str | Mapping) or not isinstance(adapters, Sequence) or not adapters:
        raise ValueError(f"ether_adapters_per_prompt: got {adapters!r}; a list with an entry for each prompt fits")
    pairs: list[tuple[str, float]] = []
    for entry in adapters:
        pair = (BASE, 1.0) if entry is None else (entry, 1.0) if isinstance(entry, str) else entry
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not is_number(pair[1]):
            raise ValueError(
                f"ether_adapters_per_prompt: {entry!r}: a name, a name with a finite strength such as "
                "('dog', 0.6), or None fits"
            )
        pairs.append((pair[0], float(pair[1])))
    names = [name for name, _ in pairs]
    layers = [layer for model in models_of(pipe).values() for layer in tuner_layers(model)]
    carried = {name for layer in layers for name in layer._get_available_adapters()}
    named([name for name in names if name != BASE], sorted(carried | set(records_of(pipe))))
    return names, [strength for _, strength in pairs]


def _check(pipe: DiffusionPipeline, models: Mapping[str, nn.Module]) -> None:
    for name, record in records_of(pipe).items():
        if record.replaced or record.control is not None:
            what = "replaced modules" if record.replaced else "a control encoder"
            raise ValueError(f"{name} holds {what}, which all rows of a batch have alike: delete it first")
    for component, model in models.items():
        part = getattr(pipe, component)
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise ValueError(
                f"{component} is compiled, and would not see which row has which adapter: use it uncompiled"
            )
        for layer in tuner_layers(model):
            if layer.merged:
                raise ValueError(f"{component}: {', '.join(layer.merged_adapters)} is fused: unfuse it first")
            if layer.disable_adapters:
                raise ValueError(f"{component}: its adapters are disabled: call enable_ether (enable_lora) first")


def _lora_strengths(
    models: Mapping[str, nn.Module], names: Sequence[str], strengths: Sequence[float]
) -> list[tuple[LoraLayer, dict[str, float]]]:
    """What LoRA layers have to be set to for the call: PEFT knows one strength for each adapter."""
    found = []
    for model in models.values():
        for layer in tuner_layers(model):
            if isinstance(layer, LoraLayer):
                own = [(n, s) for n, s in zip(names, strengths, strict=True) if n in layer._get_available_adapters()]
                scales = dict(own)
                if clash := next((name for name, strength in own if scales[name] != strength), None):
                    raise ValueError(f"{clash} is a LoRA, which PEFT gives one strength in a batch: use one for it")
                if dora := next((name for name in scales if layer.use_dora.get(name)), None):
                    raise ValueError(f"{dora} uses DoRA, which PEFT does not mix within a batch")
                found.append((layer, scales))
    return found


class _Rows:
    """Which adapter each row of a component's batch has, in one context.

    Pipelines have the images of a prompt side by side, and both halves of guidance in the same order.

    images: of each prompt, in the call of the pipeline that runs.
    """

    def __init__(
        self,
        component: str,
        is_encoder: bool,
        names: Sequence[str],
        strengths: Sequence[float],
        images: Sequence[int],
        model: nn.Module,
    ) -> None:
        self.component, self.is_encoder, self.images = component, is_encoder, images
        self.names, self.strengths = names, strengths
        self._flattened, self._rows = flattened_modules(model), 0

    def count(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take the rows of a call of the model: those of its first tensor, or list of tensors."""
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | list))
        self._rows = len(next(values, ()))

    def arguments(self, layer: nn.Module, rows: int) -> Arguments:
        """Names and strengths of the rows of a layer's input.

        Raises:
            ValueError: a batch of which it cannot be told which row is whose.
        """
        tokens = 1
        if layer in self._flattened and self._rows and rows % self._rows == 0:
            rows, tokens = self._rows, rows // self._rows
        own = self._entries_of(rows)
        names, strengths = ([values[k] for k in own for _ in range(tokens)] for values in (self.names, self.strengths))
        return arguments_of(layer, names, strengths)

    def _entries_of(self, rows: int) -> list[int]:
        """The entry of each row."""
        prompts = len(self.names)
        if not self.is_encoder and not self.images:
            raise ValueError(
                f"{self.component} is called outside of a call of the pipeline: it cannot be told whose its rows are"
            )
        each = 1 if self.is_encoder else self.images[-1]
        halves = 2 if rows == 2 * each * prompts and not self.is_encoder else 1
        if rows != halves * each * prompts:
            guided = "" if self.is_encoder else f" (or {2 * each * prompts}, with guidance)"
            raise ValueError(
                f"{self.component} has a batch of {rows} rows, but {prompts} prompts have {each * prompts}{guided}: "
                "which row is whose cannot be told"
            )
        return [k for k in range(prompts) for _ in range(each)] * halves


@contextmanager
def _calls_checked(pipe: DiffusionPipeline, entries: int, images: list[int]) -> Iterator[None]:
    """Within, calls of the pipeline are of a class derived from its own, which looks at their arguments.

    (Python looks for `__call__` on classes alone.)
    """
    kind = type(pipe)

    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        images.append(_images_of_each(kind.__call__, entries, self, *args, **kwargs))
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            images.pop()

    members = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    pipe.__class__ = type(kind.__name__, (kind,), members)
    try:
        yield
    finally:
        pipe.__class__ = kind


def _images_of_each(function: Callable, entries: int, *args: Any, **kwargs: Any) -> int:
    """The images that a call asks for, of each prompt."""
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    arguments = dict(given.arguments)
    for parameter in given.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
    for name in SCALES:
        if (arguments.get(name) or {}).get("scale", 1.0) != 1.0:
            raise ValueError(f"{name}: a scale for all adapters; give each entry a strength instead")
    value = next((arguments[name] for name in PROMPTS if arguments.get(name) is not None), None)
    prompts = 1 if isinstance(value, str) or value is None else len(value)
    if prompts != entries:
        raise ValueError(f"ether_adapters_per_prompt: {entries} entries for {prompts} prompts: exactly one each fits")
    return arguments.get("num_images_per_prompt") or 1
