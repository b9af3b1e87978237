"""Control columns of FLUX.1 as a LoRA, for diffusers' own `FluxControlPipeline`.

That pipeline gives the first projection x_embedder the tokens of image and control image side by side, (x, z), and
`load_lora_weights` widens the layer with zeros for a LoRA that asks for more inputs. An encoder of latents adds E·z
to W·x, so [0 | E] = E·[0 | I] is the whole of it: a LoRA of rank 64, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor

from ether_diffusion.adapters.components import models_of, named, records_of
from ether_diffusion.control.projection import LAYOUTS
from ether_diffusion.export.lora_files import Factors

FORMAT, COMPONENT = "diffusers-lora", "transformer"
FIRST_LAYER = LAYOUTS[FluxTransformer2DModel].path


class Columns(NamedTuple):
    """What an adapter's encoder adds to the first projection: E (o, i), in float64, times its strength."""

    adapter: str
    strength: float
    weight: Tensor


def control_columns(pipe: DiffusionPipeline, to: str, adapter_names: Sequence[str] | None) -> Columns | None:
    """The columns that a LoRA of a format can hold of what is in use on a pipeline; None where there are none.

    adapter_names: those that are exported; None: the active ones.

    Raises:
        ValueError: several encoders are in use, but stock pipelines take one control image.
    """
    records = records_of(pipe)
    chosen = None if adapter_names is None else named(adapter_names, records)
    active = {
        name: record.control
        for name, record in records.items()
        if record.control is not None and record.control.active and (chosen is None or name in chosen)
    }
    fits = to == FORMAT and isinstance(models_of(pipe).get(COMPONENT), FluxTransformer2DModel)
    if not fits or not active or not all(control.encoder.takes_latents for control in active.values()):
        return None
    if len(active) > 1:
        raise ValueError(
            f"{', '.join(active)}: have a control encoder each, but a FluxControlPipeline takes one control image: "
            "export them one by one (set_adapters)"
        )
    ((name, control),) = active.items()
    weight = control.encoder.projection.weight.detach().cpu().double()
    return Columns(name, control.weight, control.weight * weight)


def widened(factors: Factors | None, columns: Columns) -> Factors:
    """[ΔW | E] as factors: those of ΔW, where the layer itself is adapted, and of [0 | E]."""
    outputs, inputs = columns.weight.shape
    down = torch.cat([torch.zeros(inputs, inputs), torch.eye(inputs)], 1).double()
    if factors is None:
        return Factors(down, columns.weight)
    own = torch.nn.functional.pad(factors.down, (0, inputs))
    return Factors(torch.cat([own, down]), torch.cat([factors.up, columns.weight.view(outputs, inputs)], 1))
