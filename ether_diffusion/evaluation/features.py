"""Features that images are compared by: those of the Hub's models, and the miniature's own under its name.

The rooms below know no model of ours; here "miniature" is one name among the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.evaluation.options import MINIATURE
from ether_diffusion.metrics import similarity
from ether_diffusion.miniature import ClipScore


class MiniatureFeatures(nn.Module):
    """Pooled features of the miniature's own CLIP vision tower, for `frechet_distance`: (n, 3, h, w) uint8 -> (n, d).

    Distances in them are not comparable with published FIDs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tower = ClipScore().model.vision_model
        self.side: int = self.tower.config.image_size
        self.num_features: int = self.tower.config.hidden_size

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 127.5 - 1
        if values.shape[-2:] != (self.side, self.side):
            values = F.interpolate(values, size=(self.side, self.side), mode="bilinear", antialias=True)
        return self.tower(pixel_values=values).pooler_output


def load_features(
    model_id: str, *, device: torch.device | str = "cpu", batch_size: int = similarity.BATCH
) -> similarity.ClassTokenFeatures | similarity.ClipFeatures:
    """Load what embeds images, as `metrics.load_features` does; "miniature" is the miniature's own CLIP."""
    if model_id == MINIATURE:
        return ClipScore(device=device, batch_size=batch_size)
    return similarity.load_features(model_id, device=device, batch_size=batch_size)
