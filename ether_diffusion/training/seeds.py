"""Random numbers that depend on nothing but the seed, what they are for, and the index of the sample.

A sample draws the same numbers whichever process handles it, in whichever batch, before or after a resume.
"""

import hashlib

import torch


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one purpose ("noise", "crop", …) and one index; equal on every machine and Python version."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for `derive(seed, purpose, index)`: what it draws is the same whatever device computes."""
    return torch.Generator().manual_seed(derive(seed, purpose, index))
