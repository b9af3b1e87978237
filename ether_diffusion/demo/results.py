"""Where finished files lie until their owner has them: one folder, with a folder for everyone who asked."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.settings import Settings, save_image

KEPT_SECONDS = 24 * 3600
MOST_SHOWN = 200
"""Images of a history; older ones are still in the archive."""
LONGEST_SLUG = 40


class Results:
    """Files for the page, by owner; what is older than a day goes.

    Args:
        folder: private to this server.
    """

    def __init__(self, folder: Path):
        self.root = folder

    def folder(self, owner: str) -> Path:
        """A new folder of this owner's own."""
        mine = self._of(owner)
        mine.mkdir(parents=True, exist_ok=True)
        self._forget_old()
        return Path(tempfile.mkdtemp(dir=mine, prefix=f"{time.time_ns():020}-"))

    def keep(self, generated: Generated, owner: str) -> list[tuple[str, str]]:
        """Images as PNG files that hold their settings, with a caption each."""
        folder, shown = self.folder(owner), []
        for k, pair in enumerate(generated.images):
            one = replace(generated.settings, seed=generated.settings.seed + k, images=1)
            made = {"base": replace(one, adapters=()), "adapted": one}
            for (kind, settings), image in zip(made.items(), pair, strict=True):
                if image is not None:
                    path = folder / file_name(settings)
                    save_image(image, path, settings, generated.control if kind == "adapted" else None)
                    shown.append((str(path), f"{kind}, seed {settings.seed}"))
        return shown

    def history(self, owner: str) -> list[str]:
        """The images of an owner, the newest first."""
        return [str(path) for path in reversed(self._images(owner))][:MOST_SHOWN]

    def archive(self, owner: str) -> Path | None:
        """All images of an owner as one zip; None where there is none."""
        images = self._images(owner)
        if not images:
            return None
        path = self.folder(owner) / "ether-images.zip"
        with zipfile.ZipFile(path, "w") as archive:  # PNGs are compressed as they are
            for k, image in enumerate(images, 1):
                archive.write(image, f"{k:03}_{image.name}")
        return path

    def _images(self, owner: str) -> list[Path]:
        return sorted(self._of(owner).glob("*/*.png"))

    def _of(self, owner: str) -> Path:
        # Who it is comes from the browser, so the name is a digest.
        return self.root / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def _forget_old(self) -> None:
        oldest = time.time() - KEPT_SECONDS
        for folder in self.root.glob("*/*"):
            if int(folder.name.partition("-")[0]) < oldest * 1e9:
                shutil.rmtree(folder, ignore_errors=True)


def file_name(settings: Settings) -> str:
    """A name that says prompt, adapter and seed: `a-red-cube_my-dog-0.8_seed-7.png`."""
    adapters = "+".join(
        name if strength == 1 else f"{name}-{strength:g}" for name, strength in settings.adapters if strength
    )
    parts = [slug(settings.prompt) or "image", slug(adapters, keep="+.") or "base", f"seed-{settings.seed}"]
    return "_".join(parts) + ".png"


def slug(text: str, keep: str = "") -> str:
    """A text as a part of a file's name: letters and digits of any script, joined by hyphens."""
    return re.sub(rf"[^\w{re.escape(keep)}]+", "-", text).strip("-_")[:LONGEST_SLUG].rstrip("-_")
