"""How much each part measures."""

from __future__ import annotations

from dataclasses import dataclass

from ether_diffusion.base_models import MINIATURE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole measurement by default.

    seed: of adapters, inputs and arrivals.
    rounds: of denoising steps; image_rounds: of whole images; overhead_rounds: of the engine's overhead.
    image_steps: of whole images.
    residents: adapters in main memory, the first to compare the others with; resident_rounds: of steps beside them.
    admissions: adapters read from the disk, of each method.
    loads: shares of what the server can do; arrivals: requests at each.
    load_steps: of their images.
    clients, names, kinds, requests, leaving, further: of the soak.
    host_memory: MiB that the soak's server has for adapters; few of them fit.
    """

    base: str = MINIATURE
    seed: int = 0
    rounds: int = 60
    image_rounds: int = 5
    image_steps: int = 5
    residents: tuple[int, ...] = (10, 100, 1_000, 10_000)
    resident_rounds: int = 40
    admissions: int = 100
    overhead_rounds: int = 5
    loads: tuple[float, ...] = (0.3, 0.6, 0.8, 0.95)
    arrivals: int = 160
    load_steps: int = 8
    clients: int = 40
    names: int = 1_000
    kinds: int = 16
    requests: int = 400
    leaving: int = 30
    further: int = 2_000
    host_memory: int = 8


QUICK = {
    "rounds": 3,
    "image_rounds": 1,
    "image_steps": 2,
    "residents": (2, 20),
    "resident_rounds": 3,
    "admissions": 5,
    "overhead_rounds": 1,
    "loads": (0.5,),
    "arrivals": 20,
    "load_steps": 2,
    "clients": 8,
    "names": 50,
    "kinds": 4,
    "requests": 40,
    "leaving": 4,
    "further": 40,
}
"""What is measured in place of it to see that all of it runs."""
