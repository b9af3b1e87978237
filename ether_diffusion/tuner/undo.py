"""Models as they were, bit for bit, where a call over several layers or components raises half way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ether_diffusion.tuner.base_layer import is_plain

COLLECTIONS = (dict, OrderedDict, list, set)
"""Attributes of modules that are written over in place, and so are put back in place: others hold them too."""


@contextmanager
def restored_on_error(models: Iterable[nn.Module], written_over: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put modules, adapters and weights back as they were where the block raises.

    Args:
        models: all that the block may change.
        written_over: weights that it may change in place; copies of them wait on the CPU. Of all others, which get
            another tensor, the old one is kept.
    """
    models = list(models)
    attributes = [(module, dict(vars(module))) for model in models for module in model.modules()]
    collections = [
        (value, value.copy()) for _, each in attributes for value in each.values() if type(value) in COLLECTIONS
    ]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers()) if is_plain(t)]
    data = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
    copies = [(tensor.data, tensor.detach().to("cpu", copy=True)) for tensor in written_over if is_plain(tensor)]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for value, before in collections:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for tensor, before, requires_grad in data:
            with torch.inference_mode(tensor.is_inference()):  # what was made in it is changed in it alone
                if tensor.data.data_ptr() != before.data_ptr() or tensor.dtype != before.dtype:
                    tensor.data = before
                tensor.requires_grad = requires_grad
        for tensor, before in copies:
            with torch.inference_mode(tensor.is_inference()):
                tensor.copy_(before)
        raise
