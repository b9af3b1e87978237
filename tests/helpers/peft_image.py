"""What PEFT's image benchmark runs on, in small: FLUX.2 klein and DINOv2 with random weights, twenty drawn images.

    PYTHONPATH=tests python -m helpers.peft_image out/small

writes them to the folders model, dinov2 and images, for `benchmarks/peft_image_benchmark.py`.
"""

import sys
from pathlib import Path

import torch
from helpers import flow_zoo
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from ether_diffusion.miniature.world import subjects

TEXT_LAYERS = 30
"""Of the text encoder: the benchmark asks for the states of 10, 20 and 30."""
IMAGES = 20


def save_inputs(folder: Path) -> Path:
    torch.manual_seed(0)
    flow_zoo.klein(folder, layers=TEXT_LAYERS).save_pretrained(folder / "model")
    save_dinov2(folder / "dinov2")
    save_images(folder / "images")
    return folder


def save_dinov2(folder: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    # With the usual small weights, the class token would be the same for all images.
    Dinov2Model(Dinov2Config(**size, initializer_range=0.5)).save_pretrained(folder)
    # DINOv2's own processor is the same under another name, and needs torchvision.
    cut = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**cut).save_pretrained(folder)


def save_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for k in range(IMAGES):
        subjects()[0].view(k).render().image.save(folder / f"{k:02}.png")


if __name__ == "__main__":
    save_inputs(Path(sys.argv[1]))
