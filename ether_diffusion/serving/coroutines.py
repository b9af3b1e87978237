"""Threads as coroutines: a function that runs only while it is resumed, so that one thread runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Stop(BaseException):
    """Raised where a coroutine waits, to end it; no `Exception`, so that nobody's handler takes it for a failure."""


class Coroutine:
    """A function on a thread of its own, which runs between `resume` and its next `pause`.

    Attributes:
        ended: whether the function has returned or raised.
        result, error: what came of it.
    """

    _here = threading.local()

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self._function = function
        self._go, self._paused = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._paused.acquire()
        self._given: Any = None
        self._error: BaseException | None = None
        self._asked: Any = None
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @classmethod
    def current(cls) -> Coroutine | None:
        """The coroutine whose thread this is."""
        return getattr(cls._here, "coroutine", None)

    def resume(self, given: Any = None, *, error: BaseException | None = None) -> Any:
        """Let it run, `pause` there returning `given` or raising `error`; what it pauses with next, or None."""
        self._given, self._error = given, error
        self._go.release()
        self._paused.acquire()
        asked, self._asked = self._asked, None
        if self.ended:
            self._thread.join()
        return asked

    def pause(self, asked: Any) -> Any:
        """On its own thread: wait for the next `resume`."""
        self._asked = asked
        self._paused.release()
        self._go.acquire()
        given, error = self._given, self._error
        self._given = self._error = None
        if error is not None:
            raise error
        return given

    def _run(self) -> None:
        Coroutine._here.coroutine = self
        self._go.acquire()
        try:
            if self._error is not None:
                raise self._error
            self.result = self._function()
        except BaseException as error:  # it belongs to whoever asked for the result
            self.error = error
        finally:
            self.ended = True
            self._function = None
            self._paused.release()
