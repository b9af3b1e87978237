"""Where finished files lie until the page has them: one folder, with a folder for everyone who asked."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.settings import save_image


class Results:
    """Files for the page, by owner.

    Args:
        folder: private to this server; `forget` removes what it holds of one owner.
    """

    def __init__(self, folder: Path):
        self.root = folder

    def folder(self, owner: str) -> Path:
        """A new folder of this owner's own. Who it is comes from the browser, so its name is a digest."""
        mine = self.root / hashlib.sha256(owner.encode()).hexdigest()[:32]
        mine.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=mine))

    def keep(self, generated: Generated, owner: str) -> list[tuple[str, str]]:
        """Images as PNG files that hold their settings, with a caption each."""
        folder, shown = self.folder(owner), []
        for k, pair in enumerate(generated.images):
            one = replace(generated.settings, seed=generated.settings.seed + k, images=1)
            made = {"base": replace(one, adapters=()), "adapted": one}
            for (kind, settings), image in zip(made.items(), pair, strict=True):
                if image is not None:
                    path = folder / f"{kind}-{settings.seed}.png"
                    save_image(image, path, settings, generated.control if kind == "adapted" else None)
                    shown.append((str(path), f"{kind}, seed {settings.seed}"))
        return shown

    def forget(self, owner: str) -> None:
        shutil.rmtree(self.root / hashlib.sha256(owner.encode()).hexdigest()[:32], ignore_errors=True)
