"""What adapted layers make of their vectors, made for all layers of a model together, once a step.

On a GPU a layer waits for the number of operations, not for their sums: unit vectors and their products with the
weights, layer by layer, are thousands of launches in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ether_diffusion.tuner.base_layer import intercepted, is_plain
from ether_diffusion.tuner.layer import EtherLayer
from ether_diffusion.tuner.operators.shared import FactorGroup


class ModelFactors:
    """Makes the factors of a model's adapted layers together: see `shared`.

    Args:
        model: any module; the adapted layers that it has now count.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, EtherLayer)]
        self.model = model

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A context of one forward pass and its backward pass, in which layers find what is made of their vectors.

            factors = ModelFactors(model)
            for batch in data:
                with factors.shared():
                    loss = model(batch).mean()
                    loss.backward()
                optimizer.step()

        The numbers are those of layers on their own, to rounding. A layer whose vectors or weight are changed inside,
        in place or by others, makes its own (what is written through `.data`, PyTorch does not see), and so does one
        with several adapters or blocks, over a layer that is quantised, sharded, offloaded or hooked, and in a
        compiled graph. Checkpointed parts of the model have to run their backward pass inside.

        Raises:
            RuntimeError: the context is entered already.
        """
        if any(layer.shared_factors is not None for layer in self.layers):
            raise RuntimeError("the factors of this model's layers are shared already: leave that context first")
        try:
            for group in self._groups():
                made = FactorGroup([layer.base_layer.weight for layer, _ in group], [each for _, each in group])
                for (layer, _), factors in zip(group, made.layers, strict=True):
                    layer.shared_factors = factors
            yield
        finally:
            for layer in self.layers:
                layer.shared_factors = None

    def _groups(self) -> list[list]:
        """Layers that can share, with their vectors, in groups."""
        compiled = {inner for each in self.model.modules() if _is_compiled(each) for inner in each.modules()}
        groups: dict[tuple, list] = {}
        for layer in self.layers:
            base, names = layer.base_layer, layer.acting_adapters
            if len(names) != 1 or layer.merged or layer.num_blocks[names[0]] != 1 or layer in compiled:
                continue
            if type(base) is not nn.Linear or intercepted(base) or not is_plain(base.weight):
                continue
            vectors, weight = layer.vectors(names[0]), base.weight
            if weight.requires_grad or any(each.device != weight.device for each in vectors.named().values()):
                continue
            # What has to be the same within a group.
            kind = (*vectors.named(), weight.shape, weight.dtype, weight.device, vectors.u.dtype)
            groups.setdefault(kind, []).append((layer, vectors))
        return list(groups.values())


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
