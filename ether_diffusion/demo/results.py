"""Where finished files lie until their owner has them: one folder, with a folder for everyone who asked."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ether_diffusion.demo.jobs import Generated
from ether_diffusion.demo.settings import Settings, save_image
from ether_diffusion.images import image_grid

KEPT_SECONDS = 24 * 3600
ARCHIVE = "ether-images.zip"
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
        """Images as PNG files that hold their settings, with a caption each; of a grid a labelled sheet as well."""
        folder, shown, asked = self.folder(owner), [], generated.settings
        for k, row in enumerate(generated.images):
            for column, image in zip(asked.columns, row, strict=True):
                one = replace(asked, seed=asked.seed + k, images=1, adapters=column, strengths=())
                path = folder / file_name(one)
                save_image(image, path, one, generated.control if column else None)
                shown.append((str(path), f"{caption(asked, column)}, seed {one.seed}"))
        if len(generated.images) > 1 or asked.strengths:
            columns = zip(asked.columns, zip(*generated.images, strict=True), strict=True)
            sheet = image_grid([(caption(asked, column), images) for column, images in columns])
            path = folder / f"{Path(file_name(asked)).stem}_sheet.png"
            save_image(sheet, path, asked, generated.control)
            shown.append((str(path), "all on one sheet"))
        return shown

    def history(self, owner: str) -> list[str]:
        """The images of an owner, the newest first."""
        return [str(path) for path in reversed(self._images(owner))][:MOST_SHOWN]

    def archive(self, owner: str) -> Path | None:
        """All images of an owner as one zip; None where there is none."""
        images = self._images(owner)
        if not images:
            return None
        for earlier in self._of(owner).glob(f"*/{ARCHIVE}"):
            earlier.unlink(missing_ok=True)
        path = self.folder(owner) / ARCHIVE
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
    adapters = "+".join(name if strength == 1 else f"{name}-{strength:g}" for name, strength in settings.adapters)
    parts = [slug(settings.prompt) or "image", slug(adapters, keep="+.") or "base", f"seed-{settings.seed}"]
    return "_".join(parts) + ".png"


def caption(asked: Settings, column: Sequence[tuple[str, float]]) -> str:
    """What an image of `asked.columns` is called."""
    if asked.strengths:
        return f"{column[0][0]} at {column[0][1]:g}"
    return "adapted" if column else "base"


def slug(text: str, keep: str = "") -> str:
    """A text as a part of a file's name: letters and digits of any script, joined by hyphens."""
    return re.sub(rf"[^\w{re.escape(keep)}]+", "-", text).strip("-_")[:LONGEST_SLUG].rstrip("-_")
