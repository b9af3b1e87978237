"""Gives `DiffusionPipeline` its `*_ether_*` methods, without importing diffusers' pipelines before anybody needs them.

Diffusers imports its parts when they are first used, and its pipelines bring every model with them, a fifth of what
all of diffusers, transformers and PEFT cost. So the methods are put on `DiffusionPipeline` when its module is
imported, by whom ever, and their own modules are imported when one of them is first looked up.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE, CLASS = "diffusers.pipelines.pipeline_utils", "DiffusionPipeline"
NAMES = (
    "load_ether_weights",
    "save_ether_weights",
    "ether_state_dict",
    "unload_ether_weights",
    "fuse_ether",
    "unfuse_ether",
    "set_adapters",
    "get_active_adapters",
    "get_list_adapters",
    "delete_adapters",
    "enable_ether",
    "disable_ether",
    "set_ether_device",
    "save_pretrained",
    "ether_adapters_per_prompt",
    "load_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora_weights",
    "fuse_qkv_projections",
    "add_control",
    "ether_adapters",
)
"""What `adapters.pipeline.install` puts on the class."""


class Later:
    """An attribute of `DiffusionPipeline` that is put in place when it is first looked up, with all others.

    replaced: what diffusers has under this name; None where it has nothing.
    """

    def __init__(self, name: str, replaced: Any):
        self.name, self.replaced = name, replaced

    def __get__(self, pipe: Any, kind: type) -> Any:
        from ether_diffusion.adapters.pipeline import install

        install()
        owner = getattr(sys.modules[MODULE], CLASS)
        return vars(owner)[self.name].__get__(pipe, kind)


def stock_attribute(owner: type, name: str) -> Any:
    """What diffusers itself has under a name of `DiffusionPipeline`, before `install` puts ours in its place."""
    found = vars(owner)[name]
    return found.replaced if isinstance(found, Later) else found


def put_methods(module: ModuleType) -> None:
    """Put the methods on the class of diffusers' module, which nothing is imported for."""
    owner = getattr(module, CLASS)
    for name in NAMES:
        setattr(owner, name, Later(name, vars(owner).get(name)))


class _Watch(MetaPathFinder):
    """Stands before the other finders until diffusers' module is imported, puts the methods there, and leaves."""

    looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # One thread at a time comes here for this name: it holds the lock of the module.
        if name != MODULE or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                put_methods(module)
                sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # of this loader alone, which is made for this module
        return spec


def watch() -> None:
    """Have the methods on `DiffusionPipeline`, now if its module is imported, else as soon as it is."""
    module = sys.modules.get(MODULE)
    if module is not None and hasattr(module, CLASS):
        put_methods(module)
    else:
        sys.meta_path.insert(0, _Watch())
