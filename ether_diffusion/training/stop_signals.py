"""Signals that stop a run after a complete step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal has ended the run after a step and a checkpoint. `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, step: int, steps: int, checkpoint: Path):
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step} of {steps}, saved as {checkpoint}; to go on, "
            "repeat the command with --resume_from_checkpoint latest"
        )


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one does what it did before.

    On leaving, the handlers are those that were found. Outside the main thread Python takes no handlers, and nothing
    is noted.

    Attributes:
        number: of the signal that came, 0 before.
    """

    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0
        self._found: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._found = {each: signal.signal(each, self._note) for each in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._found.items():
            signal.signal(each, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
