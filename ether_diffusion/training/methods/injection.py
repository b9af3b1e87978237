"""Put a method on a pipeline's components: a dry run without weights, the injection, and what is trained then."""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import gcd

import torch
from peft import BOFTConfig, OFTConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.boft import layer as boft_layer
from torch import nn

from ether_diffusion.errors import InputError
from ether_diffusion.training.seeds import derive

ADAPTER_NAME = "default"
ALL_LINEAR = "all-linear"
ADAPTABLE = (nn.Linear, nn.Conv2d)
TYPES_FOR_OTHER_LAYERS = ("LN_TUNING", "IA3", "LORA", "TRAINABLE_TOKENS")
"""PEFT types that also take layers which are neither Linear nor Conv2d: norms, embeddings."""

Configs = Mapping[str, PeftConfig | None]
"""Component -> config of its adapter, or None where all of its weights are trained."""


class FittedOFTConfig(OFTConfig):
    """OFT with the largest block size up to `oft_block_size` that divides the width of every adapted layer.

    PEFT would choose another size per layer, the next above or below.
    """


def dry_run(models: Mapping[str, nn.Module], configs: Configs) -> int:
    """Put the adapters on models without weights, and return the number of parameters to be trained.

    Args:
        models: component -> model on the meta device; they keep the adapters.
        configs: component -> config, or None for all weights.

    Raises:
        InputError: a target that no layer's name ends with (lists the names there are), or a layer that cannot be
            adapted so (names the layer and what fits).
    """
    for component, config in configs.items():
        if config is not None:
            if config.target_modules == ALL_LINEAR:
                config.target_modules = linear_layers(models[component])
            if isinstance(config.target_modules, str):
                _check_pattern(component, models[component], config.target_modules)
            kinds = nn.Module if config.peft_type in TYPES_FOR_OTHER_LAYERS else ADAPTABLE
            _check_targets(component, models[component], config.target_modules, kinds)
    add_adapters(models, configs, seed=0)
    return sum(parameter.numel() for parameter in trained_parameters(models, configs))


def linear_layers(model: nn.Module) -> set[str]:
    """The names of all linear layers in the blocks of a model, without what is before and after them."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in blocks)
    }


def _check_pattern(component: str, model: nn.Module, pattern: str) -> None:
    """A pattern must be a regular expression, and the name of at least one layer has to match it."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--target_modules {pattern}: is no regular expression ({error})") from error
    layers = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    if not any(map(compiled.fullmatch, layers)):
        raise InputError(f"{component}: no layer's whole name matches {pattern!r}; a name is, for one, {layers[0]}")


def _check_targets(component: str, model: nn.Module, targets: object, kinds: type | tuple[type, ...]) -> None:
    """Every target must be the ending of the name of a layer, of one of these kinds.

    PEFT itself complains only when nothing at all was found, so a misspelt name among good ones would go unnoticed.
    """
    if not isinstance(targets, (list, set, tuple)):
        return
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for target in sorted(targets):
        if not any(_ends_with(name, target) for name in names):
            layers = (name for name, module in model.named_modules() if isinstance(module, ADAPTABLE))
            endings = sorted({_ending(name) for name in layers})
            raise InputError(f"{component}: no layer is called {target!r}; layers to adapt are {', '.join(endings)}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_target(name: str, targets: object) -> bool:
    """Whether PEFT adapts a layer: a text is a pattern of whole names, a list one of endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return isinstance(targets, (set, list)) and any(_ends_with(name, target) for target in targets)


def _ending(name: str) -> str:
    """The last part of a module's name; the last two where the last is a number, as in `to_out.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def add_adapters(models: Mapping[str, nn.Module], configs: Configs, *, seed: int) -> None:
    """Freeze the models, inject the adapters and make them alone trainable, in float32 whatever the model's dtype.

    Where the config is None, all of the model becomes trainable and float32. The start is drawn from (seed, component)
    alone, and torch's global random state is left as it was. The configs are copied: what the model holds in
    `peft_config` is what was injected.

    Raises:
        InputError: a layer that cannot be adapted so.
    """
    for component, config in configs.items():
        model = models[component]
        if config is None:
            nn.Module.to(model, torch.float32).requires_grad_(True)  # past ModelMixin.to, which logs a warning
            continue
        model.requires_grad_(False)
        with torch.random.fork_rng(), _without_compiler():
            torch.manual_seed(derive(seed, f"adapter of {component}"))
            try:
                _inject(model, _fitted(model, config))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise InputError(f"{component}: {error}") from error
            except (KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
                # Of PEFT's own making, where a config lacks what its method looks for; the text alone says little.
                raise InputError(f"{component}: PEFT cannot adapt it so ({type(error).__name__}: {error})") from error
        _to_float32(model)


def trained_parameters(models: Mapping[str, nn.Module], configs: Configs) -> list[nn.Parameter]:
    """The parameters that are trained, in the order of the modules."""
    return [
        parameter for component in configs for parameter in models[component].parameters() if parameter.requires_grad
    ]


def _inject(model: nn.Module, config: PeftConfig) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if not tuner.uses_shared_state:
        model.add_adapter(config, ADAPTER_NAME)
        return
    # `add_adapter` refuses VeRA, whose layers share matrices that the tuner makes; every layer keeps a reference to
    # them, so the model works without the tuner.
    tuner(model, config, ADAPTER_NAME)
    model._hf_peft_config_loaded = True  # what diffusers and transformers ask before they switch adapters
    model.set_adapter(ADAPTER_NAME)


def _to_float32(model: nn.Module) -> None:
    """What is trained, and what VeRA's layers share, in float32; the latter also on the model's device."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, BufferDict):
            module.to(device, torch.float32)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """BOFT as plain PyTorch.

    For every layer PEFT would try anew to compile a CUDA kernel, which takes minutes or fails, changes the environment
    where it fails, and answers on a GPU alone.
    """
    found = boft_layer.get_fbd_cuda
    boft_layer.get_fbd_cuda = lambda: None
    try:
        yield
    finally:
        boft_layer.get_fbd_cuda = found


def _fitted(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """A copy of a config to inject; ValueError for blocks that do not divide every width: PEFT would take others."""
    config = copy.deepcopy(config)
    if not isinstance(config, (OFTConfig, BOFTConfig)):
        return config
    if isinstance(config, BOFTConfig) and config.boft_n_butterfly_factor > 1:
        raise ValueError(
            f"boft_n_butterfly_factor={config.boft_n_butterfly_factor} needs a kernel that is compiled for the GPU at "
            "hand; 1 fits"
        )
    widths = {
        name: module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE) and _is_target(name, config.target_modules)
    }
    if isinstance(config, FittedOFTConfig):
        return _with_common_block(config, set(widths.values()))
    fields = ("boft_block_num", "boft_block_size") if isinstance(config, BOFTConfig) else ("r", "oft_block_size")
    field = next(name for name in fields if getattr(config, name))
    size = getattr(config, field)
    for name, width in widths.items():
        if size < 1 or width % size:
            fits = ", ".join(str(k) for k in range(1, min(width, 64) + 1) if width % k == 0)
            raise ValueError(f"{name}: {field}={size} does not divide {width}; try {fits}")
    return config


def _with_common_block(config: FittedOFTConfig, widths: set[int]) -> OFTConfig:
    largest = config.oft_block_size
    fits = [size for size in range(2, largest + 1) if gcd(*widths) % size == 0]
    if not fits:
        listed = ", ".join(map(str, sorted(widths)))
        raise ValueError(
            f"no block size from 2 to {largest} divides all widths ({listed}); name fewer layers to adapt"
        )
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name != "peft_type"}
    return OFTConfig(**values | {"oft_block_size": fits[-1]})
