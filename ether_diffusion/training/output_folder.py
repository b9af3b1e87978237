"""The output folder of a run: what earlier runs left in it, and that one run at a time writes to it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.files import nearest_existing
from ether_diffusion.training.accelerator import on_main_process
from ether_diffusion.training.card import CARD_NAME, CONTROL_NAME, GRID_NAME
from ether_diffusion.training.checkpoint_files import PREFIX
from ether_diffusion.training.methods.saving import LORA_NAME

LOCK_NAME = ".training.lock"
RESULTS = (WEIGHTS_NAME, LORA_NAME, DiffusionPipeline.config_name, CARD_NAME, GRID_NAME, CONTROL_NAME)
"""What runs leave, besides folders that are called like what was trained."""


def check_output_dir(folder: str | Path) -> Path:
    """Make sure that the output folder can be written to, or made; nothing is left behind.

    Raises:
        InputError: it cannot.
    """
    folder = Path(folder)
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return folder
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written to ({error})") from error


class OutputFolder:
    """The output folder as it was found before the run.

    Args:
        path: the folder; need not be there.
        names: of folders that this run writes besides `RESULTS`.
    """

    def __init__(self, path: Path, names: Collection[str] = ()):
        self.path, self.names = path, (*RESULTS, *names)
        self.found = self._look()

    def _look(self) -> list[str]:
        """The names in the folder that a run writes."""
        entries = [each.name for each in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(name for name in entries if name in self.names or name.startswith(PREFIX))

    def check_unused(self, *, goes_on: bool, overwrite: bool) -> None:
        """Make sure that the run writes over nothing without being told to.

        Args:
            goes_on: whether it starts from a checkpoint of the run that left this.
            overwrite: whether what is there may be replaced.

        Raises:
            InputError: it would; names what is there.
        """
        left = [name for name in self.found if not name.startswith(PREFIX)]
        if left and not (goes_on or overwrite):
            raise InputError(
                f"--output_dir {self.path}: holds {', '.join(left)}, which this run would write over; take another "
                "folder, or give --overwrite_output_dir, or go on from a checkpoint with --resume_from_checkpoint"
            )

    @contextlib.contextmanager
    def claimed(self, accelerator: Accelerator) -> Iterator[None]:
        """A context in which no other run writes to the folder, which is there then. Entered by every process.

        Raises:
            InputError: another run is at work, or has been since the folder was looked at.
        """
        with contextlib.ExitStack() as stack:
            on_main_process(accelerator, lambda: stack.enter_context(self._locked()))
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_NAME)
        try:
            lock.acquire(timeout=0)  # the system's own lock: it ends with the process, however that ends
        except Timeout as error:
            raise InputError(
                f"--output_dir {self.path}: another run writes to it now; wait for its end, or take another folder"
            ) from error
        except OSError as error:
            raise InputError(f"--output_dir {self.path}: cannot be locked for this run ({error})") from error
        try:
            if self._look() != self.found:
                raise InputError(f"--output_dir {self.path}: another run has just written to it; start this one again")
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                (self.path / LOCK_NAME).unlink()
            lock.release()
            if is_new:
                with contextlib.suppress(OSError):  # there is something in it
                    self.path.rmdir()
