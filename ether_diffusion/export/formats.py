"""The formats of LoRA files by their names, for those who ask for one: what writes them is in `lora_files`."""

FORMATS = ("peft-lora", "diffusers-lora", "kohya")
DEFAULT_NAMES = {"diffusers-lora": "pytorch_lora_weights.safetensors", "kohya": "kohya_lora.safetensors"}
"""Of the formats that are one file."""
