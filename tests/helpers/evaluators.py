"""Small evaluators of control: a UperNet with random weights, and the miniature's segmenter after a few steps."""

from pathlib import Path

import torch
from transformers import ConvNextConfig, SegformerImageProcessorPil, UperNetConfig, UperNetForSemanticSegmentation

from ether_diffusion.miniature.segmenter import SegmenterSettings

QUICK = SegmenterSettings(steps=12, batch_size=8, renders=24, softened=4, held_out=8)


def save_upernet(folder: Path) -> Path:
    """A UperNet of 7 classes, as the Hub holds it."""
    torch.manual_seed(0)
    backbone = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=7
    )
    UperNetForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
