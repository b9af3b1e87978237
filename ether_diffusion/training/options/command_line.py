"""A command line that is derived from dataclasses.

Each field holds its one default, one help text and one validator; a group of fields is a dataclass, a script's options
are a dataclass of groups.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from ether_diffusion.errors import InputError

Options = TypeVar("Options")


@dataclass(frozen=True)
class Fits:
    """A validator: a test of one value, and the words that end "got …, needs …"."""

    words: str
    test: Callable[[Any], bool]


POSITIVE = Fits("a whole number from 1", lambda value: value >= 1)
NOT_NEGATIVE = Fits("a whole number from 0", lambda value: value >= 0)
ABOVE_ZERO = Fits("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
FROM_ZERO = Fits("a finite number from 0", lambda value: math.isfinite(value) and value >= 0)
BELOW_ONE = Fits("a number from 0 and below 1", lambda value: 0 <= value < 1)
TEXT = Fits("a text that is not blank", lambda value: bool(value.strip()))
TEXTS = Fits("one text or more, none blank", lambda values: bool(values) and all(value.strip() for value in values))


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[str] | None = None,
    fits: Fits | None = None,
    needs: str | None = None,
    free: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Without a default the flag is required.

    Args:
        help: what the flag does.
        default: its value when it is not given.
        choices, fits: what its value may be.
        needs: another flag of the group, without which this one has no effect.
        free: the adapter does not depend on it, so a run that goes on from a checkpoint may give another value.
    """
    metadata = {"help": help, "choices": choices, "fits": fits, "needs": needs, "free": free}
    return field(default=default, metadata=metadata)


class OptionGroup:
    """Base of the groups: checks every value when it is made, from the command line or from Python."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, choices, fits = getattr(self, each.name), each.metadata["choices"], each.metadata["fits"]
            if value is None:
                continue
            if choices and value not in choices:
                raise InputError(f"--{each.name}: got {value!r}, needs one of {', '.join(choices)}")
            if fits and not fits.test(value):
                raise InputError(f"--{each.name}: got {value!r}, needs {fits.words}")
            needs = each.metadata["needs"]
            if needs and value != each.default and not getattr(self, needs):
                raise InputError(f"--{each.name}: has no effect without --{needs}; add it")


def _groups(options: type) -> dict[str, type]:
    """Name -> dataclass of the groups that a script's options consist of."""
    hints = typing.get_type_hints(options)
    return {each.name: hints[each.name] for each in fields(options)}


def _arguments(annotation: Any) -> dict[str, Any]:
    """What argparse must know about a field's type: bool, a scalar, a tuple of texts, each of them perhaps None."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (each for each in annotation.__args__ if each is not type(None))
    if annotation is bool:
        return {"action": "store_true"}
    if typing.get_origin(annotation) is tuple:
        return {"nargs": "+", "type": typing.get_args(annotation)[0]}
    return {"type": annotation}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage of so many flags would hide them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def build_parser(options: type, description: str | None = None) -> argparse.ArgumentParser:
    """The command line of a dataclass of option groups.

    Args:
        options: a dataclass whose fields are annotated with subclasses of `OptionGroup`.
        description: what `--help` says first.
    """
    # Abbreviated flags would change their meaning when a flag is added.
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for group in _groups(options).values():
        section = parser.add_argument_group((group.__doc__ or group.__name__).strip())
        hints = typing.get_type_hints(group)
        for each in fields(group):
            arguments = _arguments(hints[each.name])
            if each.default is dataclasses.MISSING:
                arguments["required"] = True
            elif arguments.get("action") != "store_true":
                arguments["default"] = each.default
            if each.metadata["choices"]:
                arguments["choices"] = each.metadata["choices"]
            text = each.metadata["help"]
            if each.default not in (dataclasses.MISSING, None, False) and "Default" not in text:
                text += f" Default: {each.default}."
            section.add_argument(f"--{each.name}", help=text.replace("%", "%%"), **arguments)
    return parser


def parse_options(
    options: type[Options], arguments: Sequence[str] | None = None, description: str | None = None
) -> Options:
    """Read a command line into a dataclass of option groups.

    Args:
        options: as for `build_parser`.
        arguments: the words after the script's name; `sys.argv[1:]` if None.
        description: what `--help` says first.

    Raises:
        SystemExit: an unknown flag, a missing one, a value of the wrong type or outside the choices.
        InputError: a value that does not fit.
    """
    parsed = vars(build_parser(options, description).parse_args(arguments))
    made = {}
    for name, group in _groups(options).items():
        values = {each.name: parsed[each.name] for each in fields(group)}
        made[name] = group(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )
    return options(**made)


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
    """The flat options that the adapter depends on: a run that goes on from a checkpoint has to repeat them."""
    free = {each.name for group in _groups(type(options)).values() for each in fields(group) if each.metadata["free"]}
    return {name: value for name, value in flatten(options).items() if name not in free}
