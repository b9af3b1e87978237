"""Put ETHER on a pipeline's components: configs from the options, a rehearsal without weights, the injection."""

from collections.abc import Mapping

import torch
from torch import nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.training.families import Family
from ether_diffusion.training.options import AdapterOptions, InputError
from ether_diffusion.training.seeds import derive

ADAPTER_NAME = "default"


def adapter_configs(family: type[Family], options: AdapterOptions) -> dict[str, EtherConfig]:
    """Component -> EtherConfig, for the components that are trained."""
    targets = {family.denoiser: options.target_modules}
    if options.train_text_encoder:
        targets |= dict.fromkeys(family.text_encoders, options.text_encoder_target_modules)
    return {
        component: EtherConfig(
            method=options.method,
            num_blocks=options.num_blocks,
            target_modules=None if names is None else list(names),
        )
        for component, names in targets.items()
    }


def rehearse(models: Mapping[str, nn.Module], configs: Mapping[str, EtherConfig]) -> int:
    """Put the adapters on models without weights, and return the number of parameters to be trained.

    Args:
        models: component -> model on the meta device; they keep the adapters.
        configs: component -> config.

    Raises:
        InputError: a target that no layer's name ends with (lists the names there are), or a layer that cannot be
            adapted so (names the layer and what fits).
    """
    for component, config in configs.items():
        check_targets(component, models[component], config.target_modules)
    add_adapters(models, configs, seed=0)
    return sum(parameter.numel() for parameter in trained_parameters(models, configs))


def check_targets(component: str, model: nn.Module, targets: object) -> None:
    """Raise `InputError` unless every target is the ending of the name of a Linear or Conv2d of the model.

    PEFT itself complains only when nothing at all was found, so a misspelt name among good ones would go unnoticed.
    """
    if not isinstance(targets, (list, set, tuple)):
        return
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = sorted({_ending(name) for name in names})
            raise InputError(f"{component}: no layer is called {target!r}; layers to adapt are {', '.join(endings)}")


def _ending(name: str) -> str:
    """The last part of a module's name; the last two where the last is a number, as in `to_out.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def add_adapters(models: Mapping[str, nn.Module], configs: Mapping[str, EtherConfig], *, seed: int) -> None:
    """Freeze the models, inject the adapters and make them alone trainable.

    The start is drawn from (seed, component) alone, and torch's global random state is left as it was.

    Raises:
        InputError: a layer that cannot be adapted so.
    """
    for component, config in configs.items():
        model = models[component].requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, f"adapter of {component}"))
            try:
                model.add_adapter(config, adapter_name=ADAPTER_NAME)
            except ValueError as error:
                raise InputError(f"{component}: {error}") from error


def trained_parameters(models: Mapping[str, nn.Module], configs: Mapping[str, EtherConfig]) -> list[nn.Parameter]:
    """The parameters of the adapters, in the order of the modules."""
    return [
        parameter for component in configs for parameter in models[component].parameters() if parameter.requires_grad
    ]
