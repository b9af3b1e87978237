"""Which adapters a LoRA, or merged weights, can hold: those with reflections alone."""

from __future__ import annotations

from collections.abc import Mapping

from ether_diffusion.adapters.schema import AdapterFile, ModuleWeights
from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.errors import InputError
from ether_diffusion.export.control import FORMAT


def check_expressible(adapter: AdapterFile, result: str, *, to: str | None = None, base_class: str = "") -> None:
    """Make sure that nothing of an adapter would be lost.

    Args:
        result: what is to be written, in words.
        to: the format of a LoRA, where it is one.
        base_class: the name of the base's pipeline class: columns of FLUX.1's first layer are held by a LoRA of
            diffusers' format.

    Raises:
        InputError: an adapter of control training, whose encoder or modules would be lost; says what to do instead.
    """
    weights = adapter.weights
    if not weights or (to == FORMAT and base_class == "FluxPipeline" and _are_columns(weights)):
        return
    if CONTROL in weights:
        held = "a control encoder"
        instead = "load it with EtherControlPipeline (docs/control.md has the classes of other pipelines)"
    else:
        modules = "; ".join(f"{name}: {', '.join(each.about['modules'])}" for name, each in weights.items())
        held = f"modules that were trained as a whole ({modules})"
        instead = (
            "control training leaves the ControlNet merged in the folder controlnet beside the file, for "
            "from_pretrained of ControlNetModel, FluxControlNetModel or SD3ControlNetModel"
        )
    raise InputError(f"holds {held}, which {result} has no place for; {instead}")


def _are_columns(weights: Mapping[str, ModuleWeights]) -> bool:
    return set(weights) == {CONTROL} and weights[CONTROL].about.get("kind") == "latent"
