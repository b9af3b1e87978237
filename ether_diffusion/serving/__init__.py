"""Serving: many requests on one pipeline, joined into forwards with an adapter for each row."""

from typing import TYPE_CHECKING

from ether_diffusion.lazy import imported_later

if TYPE_CHECKING:
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
_OF_JOBS = ("Cancelled", "DeadlineExceeded", "EngineClosed", "EngineFull", "Job", "Progress")
__getattr__, __dir__ = imported_later(
    __name__, {**dict.fromkeys(_OF_JOBS, "job"), "Engine": "engine", "UnknownAdapter": "store"}
)
