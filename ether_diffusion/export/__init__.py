"""Adapters leave for other tools: as LoRA files, exactly, or merged into a pipeline."""

from typing import TYPE_CHECKING

from ether_diffusion.lazy import imported_later

if TYPE_CHECKING:
    from ether_diffusion.export.lora import export_lora
    from ether_diffusion.export.merge import merge_adapters, open_adapted

__all__ = ["export_lora", "merge_adapters", "open_adapted"]
__getattr__, __dir__ = imported_later(
    __name__, {"export_lora": "lora", "merge_adapters": "merge", "open_adapted": "merge"}
)
