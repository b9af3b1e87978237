"""Adapters leave for other tools: as LoRA files, exactly, or merged into a pipeline."""

from ether_diffusion.export.lora import export_lora
from ether_diffusion.export.merge import merge_adapters, open_adapted

__all__ = ["export_lora", "merge_adapters", "open_adapted"]
