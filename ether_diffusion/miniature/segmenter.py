"""A segmenter of the miniature's world, which evaluates controlled generation: names the class of every pixel.

Trained here from scratch on the world's own renders, which come with their semantic maps, and kept in a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.files import checksum, replace_file
from ether_diffusion.metrics import confusion, mean_iou, pixel_accuracy
from ether_diffusion.miniature import FOLDER
from ether_diffusion.miniature.render import SIZE, to_tensor
from ether_diffusion.miniature.shapes import LABELS
from ether_diffusion.miniature.world import draw_scene

VERSION = 1  # of architecture and training, which the settings do not tell
GREY_LEVELS = 6.0  # largest standard deviation of the noise in training images
BATCH = 50

# Axes: n images, c channels, h and w pixels, k classes.


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """How the segmenter is trained: equal settings give equal weights on one machine.

    seed: of weights, order and augmentation.
    steps, batch_size, learning_rate: of AdamW, with a one-cycle schedule.
    renders: number of different training images, each also mirrored.
    softened: how many of them are also shown as the miniature's autoencoder gives them back, since generated images
        come out of it. A quarter of every batch is drawn from those.
    held_out: number of renders that the segmenter is tested on.
    """

    seed: int = 0
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 4e-3
    renders: int = 6000
    softened: int = 400
    held_out: int = 500

    def fingerprint(self) -> str:
        """Of all that the weights depend on."""
        settings = asdict(self) | {"version": VERSION, "labels": LABELS, "autoencoder": checksum(FOLDER / "vae")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layer = _convolve(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def _convolve(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class SegmentationNet(nn.Module):
    """U-shaped: (n, 3, h, w) in [−1, 1] -> logits (n, k, h, w); h and w are multiples of 16.

    It reasons at a quarter of the image's sides and below, and finds the borders at a half.
    """

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = 80, 128, 128
        self.down_4 = nn.Sequential(_convolve(3 * 16, fine), _Residual(fine))
        self.down_8 = nn.Sequential(_convolve(fine, middle), _Residual(middle))
        self.down_16 = nn.Sequential(_convolve(middle, coarse), _Residual(coarse))
        self.from_16, self.up_8 = nn.Conv2d(coarse, middle, 1), _convolve(middle, middle)
        self.from_8, self.up_4 = nn.Conv2d(middle, fine, 1), _convolve(fine, fine)
        self.from_4 = nn.Conv2d(fine, 4 * 40, 1)
        self.borders = nn.Sequential(nn.Conv2d(40 + 3 * 4, 64, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(64, 4 * len(LABELS))

    def cells(self, pixels: Tensor) -> Tensor:
        """Features of squares of 2 × 2 pixels: (n, h/2, w/2, c)."""
        half = F.pixel_unshuffle(pixels, 2)  # (n, 12, h/2, w/2)
        quarter = F.pixel_unshuffle(half, 2).contiguous(memory_format=torch.channels_last)  # (n, 48, h/4, w/4)
        at_4 = self.down_4(quarter)  # (n, c, h/4, w/4)
        at_8 = self.down_8(F.max_pool2d(at_4, 2))  # (n, c, h/8, w/8)
        at_16 = self.down_16(F.max_pool2d(at_8, 2))  # (n, c, h/16, w/16)
        x = self.up_8(at_8 + F.interpolate(self.from_16(at_16), scale_factor=2.0))
        x = self.up_4(at_4 + F.interpolate(self.from_8(x), scale_factor=2.0))
        x = F.pixel_shuffle(self.from_4(x), 2)  # (n, c, h/2, w/2)
        return self.borders(torch.cat([x, half.to(x.dtype)], dim=1)).movedim(1, -1)

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.head(self.cells(pixels)).movedim(-1, 1)  # (n, 4k, h/2, w/2)
        return F.pixel_shuffle(logits, 2)


class MiniatureSegmenter:
    """The segmenter, as `metrics.Segmenter`: images of SIZE × SIZE -> indices into `shapes.LABELS`.

    `record`: its settings, and how well it does on renders and on softened renders that it was not trained on.
    """

    classes = len(LABELS)

    def __init__(self, net: SegmentationNet, record: dict[str, Any]):
        self.net, self.record = net.eval(), record

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = to_tensor(images)
        if pixels.shape[-2:] != (SIZE, SIZE):
            raise ValueError(f"the miniature's segmenter got images of {images[0].size}, needs {SIZE} × {SIZE} pixels")
        return torch.cat([self.net(part).argmax(1) for part in pixels.split(BATCH)])

    @classmethod
    def load_or_train(cls, folder: str | Path, settings: SegmenterSettings | None = None) -> MiniatureSegmenter:
        """The segmenter that the folder holds for these settings; if it holds none, train it and keep it there."""
        settings = settings or SegmenterSettings()
        fingerprint = settings.fingerprint()
        path = Path(folder) / f"segmenter-{fingerprint[:16]}.safetensors"
        if path.is_file():
            net = SegmentationNet()
            net.load_state_dict(load_file(path))
            with safe_open(path, framework="pt") as file:
                return cls(net, json.loads(file.metadata()["record"]))
        segmenter = train_segmenter(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(segmenter.net.state_dict(), {"record": json.dumps(segmenter.record)}))
        return segmenter


def train_segmenter(settings: SegmenterSettings) -> MiniatureSegmenter:
    """Train a segmenter on one core, and test it. The global random state and number of threads stay as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            net = _train(settings)
        record = {"settings": asdict(settings), "fingerprint": settings.fingerprint()}
        return MiniatureSegmenter(net, record | measure(net, settings.held_out))
    finally:
        torch.set_num_threads(threads)


def renders(seed: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and truths of the first scenes of a seed: (n, 3, h, w) in [−1, 1], and (n, h, w), uint8."""
    drawn = [draw_scene(seed, k).render() for k in range(count)]
    labels = np.stack([np.asarray(each.labels) for each in drawn])
    return to_tensor([each.image for each in drawn]), torch.from_numpy(labels)


@torch.no_grad()
def soften(pixels: Tensor) -> Tensor:
    """What the miniature's autoencoder makes of images, (n, 3, h, w) in [−1, 1]."""
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae").eval()
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(BATCH)]
    return torch.cat(parts).clamp(-1, 1)


def _train(settings: SegmenterSettings) -> SegmentationNet:
    random = torch.Generator().manual_seed(settings.seed)
    pixels, labels = renders("segmenter/train", settings.renders)
    soft = soften(pixels[: settings.softened])
    labels = F.pixel_unshuffle(labels[:, None], 2).movedim(1, -1)  # (n, h/2, w/2, 4): the four pixels of each cell
    net = SegmentationNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.2
    )
    from_soft = settings.batch_size // 4
    for step in tqdm(range(settings.steps), desc="training the segmenter", mininterval=5):
        clean_ids = torch.randint(settings.renders, (settings.batch_size - from_soft,), generator=random)
        soft_ids = torch.randint(settings.softened, (from_soft,), generator=random)
        x, truth = torch.cat([pixels[clean_ids], soft[soft_ids]]), labels[torch.cat([clean_ids, soft_ids])]
        if step % 2:
            x, truth = x.flip(-1), truth.flip(2)[..., [1, 0, 3, 2]]
        level = GREY_LEVELS / 127.5 * torch.rand(len(x), 1, 1, 1, generator=random)
        x = x + level * torch.randn(x.shape, generator=random)
        # bfloat16 is several times as fast on processors that have it, and the same elsewhere.
        with torch.autocast("cpu", torch.bfloat16):
            cells, truth = net.cells(x).flatten(0, 2), truth.flatten(0, 2).long()  # (n·h/2·w/2, c), (…, 4)
            # A quarter of the cells tells nearly as much as all; things, the smaller part, come more often.
            things = (truth > 0).any(1).nonzero()[:, 0]
            of_things = torch.randint(len(things), (len(cells) // 16,), generator=random)
            of_all = torch.randint(len(cells), (3 * len(cells) // 16,), generator=random)
            at = torch.cat([things[of_things], of_all])
            logits = net.head(cells[at])
        loss = F.cross_entropy(logits.float().unflatten(1, (-1, 4)), truth[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.to(memory_format=torch.contiguous_format).eval()


def measure(net: SegmentationNet, count: int) -> dict[str, dict[str, float]]:
    """Pixel accuracy and mean IoU on renders that training has not seen, and on them softened."""
    pixels, labels = renders("segmenter/test", count)
    segmenter = MiniatureSegmenter(net, {})
    found = {}
    for name, shown in (("held_out_renders", pixels), ("held_out_softened", soften(pixels))):
        bytes_ = ((shown + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        counts = confusion(segmenter([Image.fromarray(each) for each in bytes_]), labels, len(LABELS))
        found[name] = {"pixel_accuracy": pixel_accuracy(counts), "mean_iou": mean_iou(counts)}
    return found
