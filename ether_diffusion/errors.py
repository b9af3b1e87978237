"""The errors that a user can cause: each is one sentence that says where, what arrived and what fits."""

from __future__ import annotations

LONGEST_MESSAGE = 2000


class InputError(ValueError):
    """What the user gave cannot be used. The message says where, what arrived and what fits; it needs no traceback."""


class RunError(RuntimeError):
    """What stops a run that began well, such as files that somebody removes meanwhile. It needs no traceback."""


def printable(text: str) -> str:
    """Text from a file, safe on a terminal: control characters and the like come escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EtherFileError(ValueError):
    """An adapter that cannot be loaded: names the file, the key, what came and what fits. Nothing has changed then.

    Messages quote the file, so they are cut short where they are long and escaped where they are not printable.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(printable(message))
