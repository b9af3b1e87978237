"""The components of a pipeline and the adapters on them, with one record for each adapter.

PEFT keeps vectors, configs and strengths on the layers and models. All else that an adapter consists of is in its
`AdapterRecord`. Records hang on the components that carry the adapter, not on the pipeline: pipelines are made from
each other's components (`from_pipe`), and both have to find the adapter, save it and take it off completely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.adapters.schema import canonical_path, without_base_layer
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.control.pipelines import Control, denoiser_name
from ether_diffusion.errors import EtherFileError
from ether_diffusion.tuner.base_layer import is_plain
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.layer import EtherLayer

PEFT_MODELS = (PeftModel, PeftMixedModel)
RECORDS = "_ether_records"
"""The attribute of a model that holds the records of its adapters, by name."""


@dataclass(frozen=True)
class ReplacedModules:
    """Modules of a component whose weights an adapter replaced, and the weights that they had before."""

    modules: list[str]
    originals: dict[str, Tensor]

    def parameters(self, model: nn.Module, leaving: Sequence[str]) -> dict[str, nn.Parameter]:
        """The parameters that the originals belong to, by name: offloading exchanges them, and adapters wrap modules.

        leaving: adapters that will not be fused any more when the originals are put back.

        Raises:
            ValueError: weights that are fused, or on the meta device, so that nothing can be put back.
        """
        now = {without_base_layer(name): parameter for name, parameter in model.named_parameters()}
        found = {name: now[name] for name in self.originals}
        if offloaded := next((name for name, parameter in found.items() if parameter.is_meta), None):
            raise ValueError(f"{offloaded} is offloaded, and cannot be put back: end the offloading first")
        for path, layer in ether_layers(model):
            fused = not set(layer.merged_adapters) <= set(leaving)
            if fused and f"{without_base_layer(path)}.weight" in found:
                raise ValueError(f"{path} has a fused ETHER adapter, and cannot be put back: call unfuse_ether first")
        return found


@dataclass
class AdapterRecord:
    """One ETHER adapter of a pipeline.

    configs: component -> config, of those that carry its vectors (as PEFT has them; looked up anew every time).
    replaced: component -> the modules that it replaced there.
    control: its control encoder, on pipelines that apply one.
    metadata: what the writer of its file added (the prompt), which is written again when it is saved.
    other_base: components whose base weights were others when it was made, as far as could be told.
    """

    name: str
    configs: dict[str, EtherConfig] = field(default_factory=dict)
    replaced: dict[str, ReplacedModules] = field(default_factory=dict)
    control: Control | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    other_base: list[str] = field(default_factory=list)

    @property
    def components(self) -> list[str]:
        """The components that take part, "control_encoder" last."""
        return [*dict.fromkeys([*self.configs, *self.replaced]), *([CONTROL] if self.control else [])]


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's components that are modules, by name; of a compiled one or a `PeftModel`, the model within.

    One that is there under several names is here once, under the first.
    """
    models = _models(pipe)
    return {name: models[name] for name, first in names_of(pipe).items() if name == first}


def names_of(pipe: DiffusionPipeline) -> dict[str, str]:
    """Every component that is a module -> the first name of the same model, by which `models_of` has it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(model), name) for name, model in _models(pipe).items()}


def _models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: _within_peft(_uncompiled(module)) for name, module in modules.items()}


def _uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)


def _within_peft(module: nn.Module) -> nn.Module:
    is_wrapped = isinstance(module, PEFT_MODELS) and isinstance(module.base_model, BaseTuner)
    return _uncompiled(module.base_model.model) if is_wrapped else module


def check_removable(pipe: DiffusionPipeline, adapter_names: Iterable[str]) -> None:
    """Refuse to remove the adapter that a `PeftModel` was made with or has active: it would not run any more.

    Raises:
        ValueError: names the component, and what to put there first.
    """
    names = set(adapter_names)
    for component, part in pipe.components.items():
        part = _uncompiled(part)
        if isinstance(part, PEFT_MODELS):
            own = [part.active_adapter] if isinstance(part.active_adapter, str) else list(part.active_adapter)
            if lost := [name for name in own if name in names]:
                raise ValueError(
                    f"{component} is a {type(part).__name__}, which does not run without {', '.join(lost)}: put the "
                    f"adapted model itself there first (pipe.{component} = pipe.{component}.get_base_model())"
                )


def ether_layers(model: nn.Module) -> Iterator[tuple[str, EtherLayer]]:
    """Names and ETHER layers of a model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, EtherLayer))


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a model that carry adapters of any method."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def records_of(pipe: DiffusionPipeline) -> dict[str, AdapterRecord]:
    """The ETHER adapters of a pipeline by name, however they came there (`unet.add_adapter` too)."""
    models = models_of(pipe)
    kept = {name: record for model in models.values() for name, record in model.__dict__.get(RECORDS, {}).items()}
    for record in kept.values():
        record.configs = {}
    found: dict[str, AdapterRecord] = {}
    for component, model in models.items():
        for name in dict.fromkeys(name for _, layer in ether_layers(model) for name in layer.ether_u):
            record = found.setdefault(name, kept.get(name) or AdapterRecord(name))
            record.configs[component] = model.peft_config[name]
    found |= kept
    # PEFT's own calls may have removed the layers of one; then nothing of it is left.
    return {name: record for name, record in found.items() if record.components}


def keep_record(pipe: DiffusionPipeline, record: AdapterRecord, components: Iterable[str]) -> None:
    """Hang a record on the components that take part; that of a control encoder, on the denoiser too."""
    models = models_of(pipe)
    names = [*components, *([denoiser_name(pipe)] if record.control is not None else [])]
    for name in dict.fromkeys(names):
        models[name].__dict__.setdefault(RECORDS, {})[record.name] = record


def drop_record(pipe: DiffusionPipeline, name: str) -> None:
    """Remove a record from all components; a model without any has no trace of them."""
    for model in models_of(pipe).values():
        records = model.__dict__.get(RECORDS, {})
        records.pop(name, None)
        if not records:
            model.__dict__.pop(RECORDS, None)


def as_names(what: str, value: Sequence[str] | str) -> list[str]:
    """One name, or several, as a list.

    what: the argument, for the error.

    Raises:
        ValueError: something else, such as a number or None.
    """
    if isinstance(value, str):
        return [value]
    names = list(value) if isinstance(value, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what}={value!r}: a name fits, or a list of names")
    return names


def named(adapter_names: Sequence[str] | str, known: Iterable[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: no names, or one that is not known, with those that are.
    """
    names, known = as_names("adapter_names", adapter_names), list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"there is no adapter {', '.join(map(str, unknown))}; loaded are {', '.join(known) or 'none'}"
        )
    return names


def peft_adapters(pipe: DiffusionPipeline) -> list[str]:
    """The names of the adapters of every method on any component."""
    return list(
        dict.fromkeys(name for model in models_of(pipe).values() for name in getattr(model, "peft_config", {}))
    )


def free_name(pipe: DiffusionPipeline) -> str:
    """The first of "default_0", "default_1", … that no adapter has."""
    taken = {*peft_adapters(pipe), *records_of(pipe)}
    return next(name for k in range(len(taken) + 1) if (name := f"default_{k}") not in taken)


def check_name(adapter_name: str) -> None:
    """Refuse a name that `nn.ParameterDict` cannot hold: its keys are attributes of the module.

    Raises:
        ValueError: names what is wrong.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: a name is a text without a dot")
    if hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(f"adapter_name={adapter_name!r} is taken by PyTorch's own attributes: choose another name")


def base_of(module: nn.Module) -> nn.Module:
    """A layer without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def base_weights(model: nn.Module, component: str, paths: Iterable[str]) -> dict[str, Tensor]:
    """The weights of layers without ETHER, by canonical module path."""
    modules = dict(model.named_modules())
    weights = {}
    for path in paths:
        layer = modules[path]
        weight = layer.unmerged_weight() if isinstance(layer, EtherLayer) else getattr(base_of(layer), "weight", None)
        weights[canonical_path(component, path)] = weight
    return weights


def replaceable_parameters(where: str, model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """All parameters of some modules of a model, by their paths in it.

    Raises:
        EtherFileError: no such module, one without parameters, with an adapter in it, within another that is listed,
            quantised, or offloaded.
    """
    known: Mapping[str, nn.Module] = dict(model.named_modules())
    found: dict[str, nn.Parameter] = {}
    for path in modules:
        if path not in known or path == "":
            raise EtherFileError(f"{where}: {path} does not exist in this {type(model).__name__}")
        own = {f"{path}.{name}": parameter for name, parameter in known[path].named_parameters()}
        if tuner_layers(known[path]):
            raise EtherFileError(f"{where}: {path} carries an adapter here, so its own weights cannot be replaced")
        if not own or set(own) & set(found):
            raise EtherFileError(f"{where}: {path} {'is listed twice' if own else 'has no parameters'}")
        for name, parameter in own.items():
            if not is_plain(parameter):
                raise EtherFileError(
                    f"{where}: {name} is quantised or offloaded here: load the model without that first"
                )
        found |= own
    return found
