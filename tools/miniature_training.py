"""How the tools train the miniatures: images drawn once, and optimisations that go on where they were stopped."""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ether_diffusion.files import replace_file
from ether_diffusion.miniature.render import SIZE
from ether_diffusion.miniature.world import draw_scene

CHECKPOINT_SECONDS = 120


def log(text: str) -> None:
    print(text, flush=True)


class Images:
    """The training set: `count` scenes rendered once to uint8, with their captions."""

    def __init__(self, folder: Path, count: int, seed: int):
        self.path, self.caption_path = folder / "images.npy", folder / "captions.json"
        if not self.caption_path.exists():
            log(f"drawing {count} images")
            pixels = np.lib.format.open_memmap(self.path, "w+", np.uint8, (count, SIZE, SIZE, 3))
            captions = []
            for index in range(count):
                scene = draw_scene(seed, index)
                pixels[index] = np.asarray(scene.render().image)
                captions.append(scene.caption)
            pixels.flush()
            self.caption_path.write_text(json.dumps(captions))
        self.pixels = np.load(self.path, mmap_mode="r")
        self.captions: list[str] = json.loads(self.caption_path.read_text())
        if len(self.captions) != count:
            raise ValueError(f"{folder} holds {len(self.captions)} images, --images asks for {count}: delete it")

    def batch(self, indices: Tensor) -> Tensor:
        """(b, 3, SIZE, SIZE), in [−1, 1]."""
        pixels = torch.from_numpy(np.array(self.pixels[indices.numpy()]))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class Stage:
    """One optimisation with warm-up and cosine decay, checkpointed, every batch a function of (seed, step).

    The matrices in `muon` are left to Muon (its rate in the measure of AdamW's), all else to AdamW.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        module: nn.Module,
        steps: int,
        lr: float,
        batch: int,
        muon: Sequence[nn.Parameter] = (),
        muon_lr: float = 1e-3,
    ):
        self.name, self.args, self.module, self.steps, self.size = name, args, module, steps, batch
        self.path = args.work_dir / f"{name}.pt"
        taken = {id(p) for p in muon}
        decay = [p for p in module.parameters() if p.ndim > 1 and id(p) not in taken]
        rest = [p for p in module.parameters() if p.ndim <= 1]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
                lr=lr,
                betas=(0.9, 0.99),
            )
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        self.highest_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.ema = EMAModel(module.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]
        self.ema.to(args.device)

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in (("module", self.module), ("ema", self.ema))}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "step": self.step}
        content = io.BytesIO()
        torch.save(state, content)
        replace_file(self.path, content.getvalue())

    def run(self, count: int, loss_of: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        """Train to the end; `loss_of(indices, generator)` is the loss of one batch. Leaves the averaged weights."""
        started = saved = time.monotonic()
        while self.step < self.steps:
            warm, progress = min(1.0, (self.step + 1) / 200), self.step / self.steps
            scale = warm * 0.5 * (1 + math.cos(math.pi * progress))
            for optimizer, rates in zip(self.optimizers, self.highest_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
            indices = torch.randint(count, (self.size,), generator=generator)
            loss = loss_of(indices, generator)
            if not torch.isfinite(loss):
                raise RuntimeError(f"{self.name}: the loss is {loss.item()} at step {self.step}")
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.ema.step(self.module.parameters())
            self.step += 1
            if self.step % 50 == 0:
                pace = (time.monotonic() - started) / 50
                started = time.monotonic()
                log(f"{self.name} {self.step}/{self.steps} loss {loss.item():.4f} {pace:.3f} s/step")
            if time.monotonic() - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                self.save()
                saved = time.monotonic()
        self.ema.copy_to(self.module.parameters())
        self.module.eval().requires_grad_(False)
