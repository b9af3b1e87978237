"""Requests to the engine, and what the stock pipeline makes of each alone."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from helpers.lora import ATTENTION, CLIP, save_adapter

SCHEDULERS = {
    kind.__name__: kind
    for kind in (
        DDIMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
    )
}
WAIT = 60
"""Seconds after which a test takes a request for lost."""
TARGETS = {"unet": ATTENTION, "text_encoder": CLIP[:4]}
NAMES = ["dog", "cat", "a name with spaces", "🐕"]


def save_adapters(folder: Path, base: Path, names=NAMES, first_seed: int = 1) -> Path:
    """Adapters of both methods, as `<name>.safetensors`."""
    for k, name in enumerate(names):
        method = ("ether", "ether_plus")[k % 2]
        made = save_adapter(folder / "made", base, "one", TARGETS, first_seed + k, method=method)
        (file,) = made.glob("*.safetensors")
        os.replace(file, folder / f"{name}.safetensors")
    shutil.rmtree(folder / "made")
    return folder


def scheduler_of(name: str, config):
    """Made from another's config, as users do; PNDM as Stable Diffusion has it."""
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return SCHEDULERS[name].from_config(config, **options)


@dataclass(frozen=True)
class Asked:
    """A request, by what its images depend on."""

    prompt: str = "a dog"
    scheduler: str = "DDIMScheduler"
    steps: int = 2
    guidance: float = 5.0
    seed: int = 0
    adapter: tuple[tuple[str, float], ...] = ()

    def arguments(self) -> dict:
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "output_type": "np",
        }

    def submit(self, engine, **options):
        scheduler = scheduler_of(self.scheduler, engine.pipe.scheduler.config)
        adapter = dict(self.adapter) or None
        return engine.submit(adapter=adapter, seed=self.seed, scheduler=scheduler, **self.arguments(), **options)


class Alone:
    """The stock pipeline, one request at a time, with its adapters loaded the usual way; each is made once.

    Not the pipeline that an engine serves.
    """

    def __init__(self, pipe: DiffusionPipeline, adapters=None):
        self.pipe, self.adapters = pipe, adapters
        self._made: dict[Asked, np.ndarray] = {}

    def images(self, asked: Asked) -> np.ndarray:
        if asked not in self._made:
            self._made[asked] = self._generate(asked)
        return self._made[asked]

    def _generate(self, asked: Asked) -> np.ndarray:
        stock = self.pipe.scheduler
        self.pipe.scheduler = scheduler_of(asked.scheduler, stock.config)
        names = [f"a{k}" for k in range(len(asked.adapter))]
        for name, (adapter, _) in zip(names, asked.adapter, strict=True):
            self.pipe.load_ether_weights(self.adapters / f"{adapter}.safetensors", adapter_name=name)
        if names:
            self.pipe.set_adapters(names, [strength for _, strength in asked.adapter])
        try:
            return self.pipe(**asked.arguments(), generator=torch.Generator().manual_seed(asked.seed)).images
        finally:
            self.pipe.unload_ether_weights()
            self.pipe.scheduler = stock


def distance(job, images: np.ndarray) -> float:
    """The largest difference between a job's images and these, of 1."""
    return float(np.abs(job.result(WAIT).images - images).max())
