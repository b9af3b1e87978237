"""Options as dataclasses: each field holds its one default, one help text and one validator.

A group of fields is a dataclass, a script's options are a dataclass of groups.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ether_diffusion.errors import InputError


@dataclass(frozen=True)
class Fits:
    """A validator: a test of one value, and the words that end "got …, needs …"."""

    words: str
    test: Callable[[Any], bool]


POSITIVE = Fits("a whole number from 1", lambda value: value >= 1)
NOT_NEGATIVE = Fits("a whole number from 0", lambda value: value >= 0)
ABOVE_ZERO = Fits("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
FROM_ZERO = Fits("a finite number from 0", lambda value: math.isfinite(value) and value >= 0)
PART = Fits("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Fits("a number from 0 and below 1", lambda value: 0 <= value < 1)


def is_unicode(text: str) -> bool:
    """Whether a text can be written down; bytes on a command line and escapes in JSON may be none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


PROMPT = Fits("a text that is not blank, in valid Unicode", lambda text: bool(text.strip()) and is_unicode(text))
PROMPTS = Fits(f"{PROMPT.words}, or several", lambda texts: bool(texts) and all(map(PROMPT.test, texts)))

_USUAL = {
    str: Fits("a text that is not blank", lambda value: bool(value.strip())),
    tuple: Fits("one text or more, none blank", lambda values: bool(values) and all(map(str.strip, values))),
}
"""The validators of texts that have no other."""


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] | None = None,
    fits: Fits | None = None,
    needs: str | None = None,
    without: str | Sequence[str] = (),
    free: bool = False,
    path: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Without a default the flag is required.

    Args:
        help: what the flag does.
        default: its value when it is not given.
        choices, fits: what its value may be.
        needs: another flag of the group without which this one has no effect, or "flag value", if it needs that value.
        without: likewise flags with which this one has no effect.
        free: the adapter does not depend on it, so a run that goes on from a checkpoint may give another value.
        path: it may name a file or folder, so a leading ~ is the user's home.
    """
    without = (without,) if isinstance(without, str) else without
    metadata = {"help": help, "choices": choices, "fits": fits, "needs": needs, "without": without}
    return field(default=default, metadata={**metadata, "free": free, "path": path})


class OptionGroup:
    """Base of the groups: checks every value when it is made, from the command line or from Python.

    The docstring of a group is its title in `--help`.
    """

    def __init_subclass__(cls) -> None:
        cls._argument_group_name = (cls.__doc__ or cls.__name__).strip()  # `HfArgumentParser` looks for it

    def __post_init__(self) -> None:
        for each in fields(self):
            value, metadata = getattr(self, each.name), each.metadata
            choices, fits = metadata["choices"], metadata["fits"] or _USUAL.get(type(value))
            if value is None:
                continue
            if metadata["path"]:  # shells leave it as it is after a =, and nobody expands it in a config file
                paths = (
                    tuple(map(os.path.expanduser, value)) if isinstance(value, tuple) else os.path.expanduser(value)
                )
                object.__setattr__(self, each.name, paths)
            for one in value if isinstance(value, tuple) else (value,):
                if choices and one not in choices:
                    raise InputError(f"--{each.name}: got {one!r}, needs one of {', '.join(choices)}")
            if fits and not fits.test(value):
                raise InputError(f"--{each.name}: got {value!r}, needs {fits.words}")
            if value == each.default:
                continue
            if metadata["needs"] and not self._is_given(metadata["needs"]):
                raise InputError(f"--{each.name}: has no effect without --{metadata['needs']}; add it")
            for other in filter(self._is_given, metadata["without"]):
                raise InputError(f"--{each.name}: has no effect with --{other}; drop one")

    def _is_given(self, condition: str) -> bool:
        """Whether a flag is given, or has the value that follows it in the condition."""
        name, _, wanted = condition.partition(" ")
        value = getattr(self, name)
        return str(value) == wanted if wanted else value not in (None, False)

    def check_one_given(self, first: str, second: str) -> None:
        """Make sure that one of two flags is given, and not both."""
        if (getattr(self, first) is None) == (getattr(self, second) is None):
            arrived = "neither" if getattr(self, first) is None else "both"
            raise InputError(f"--{first}, --{second}: got {arrived}, needs one of the two")


def groups_of(options: type) -> dict[str, type[OptionGroup]]:
    """Name -> dataclass of the groups that a script's options consist of."""
    hints = typing.get_type_hints(options)
    return {each.name: hints[each.name] for each in fields(options)}


def flatten(options: Any) -> dict[str, bool | int | float | str]:
    """All options as one flat dict of plain values, as experiment trackers take them."""
    flat: dict[str, bool | int | float | str] = {}
    for group in dataclasses.asdict(options).values():
        for name, value in group.items():
            if isinstance(value, tuple):
                value = ", ".join(value)
            flat[name] = "default" if value is None else value
    return flat


def binding(options: Any) -> dict[str, bool | int | float | str]:
    """The flat options that the adapter depends on: a run that goes on from a checkpoint has to repeat them.

    Training checkpoints hold them, so names and values are part of the format.
    """
    groups = groups_of(type(options)).values()
    free = {each.name for group in groups for each in fields(group) if each.metadata["free"]}
    return {name: value for name, value in flatten(options).items() if name not in free}
