"""Serving: many requests on one pipeline, joined into forwards with an adapter for each row."""

from ether_diffusion.serving.engine import Engine
from ether_diffusion.serving.job import Cancelled, DeadlineExceeded, EngineClosed, EngineFull, Job, Progress
from ether_diffusion.serving.store import UnknownAdapter

__all__ = [
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "Job",
    "Progress",
    "UnknownAdapter",
]
