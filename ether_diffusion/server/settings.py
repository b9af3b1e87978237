"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.errors import InputError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How requests are taken.

    adapters: the folder of adapters; None serves the base model alone.
    timeout: seconds that a request may take at most, and takes if it does not say.
    tokens: those that are let in; empty lets everybody in, as one client.
    token_limit: images that a token may have in line or running.
    uploads: whether adapters may be uploaded and deleted.
    max_upload: bytes of an uploaded file.
    max_pixels: width × height of an image.
    hang_after: seconds after which a forward counts as hung, and the server as dead.
    """

    adapters: Path | None = None
    timeout: float = 120.0
    tokens: frozenset[str] = frozenset()
    token_limit: int = 16
    uploads: bool = False
    max_upload: int = 256 * MIB
    max_pixels: int = 2048 * 2048
    hang_after: float = 300.0

    def __post_init__(self) -> None:
        for name in ("timeout", "token_limit", "max_upload", "max_pixels", "hang_after"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: a positive number fits")
        if self.adapters is not None and not self.adapters.is_dir():
            raise InputError(f"adapters={str(self.adapters)!r}: there is no such folder")
        if self.uploads and self.adapters is None:
            raise InputError("uploads: need adapters, the folder that they go to")
