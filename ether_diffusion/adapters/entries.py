"""Parts of an adapter file's document: what keys and types fit, and what is said of others."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ether_diffusion.errors import EtherFileError


class Entry(BaseModel):
    """A part of the document: no other keys, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], where: str, values: Any) -> Model:
    """Values from a file as a model.

    Raises:
        EtherFileError: the first thing that does not fit: where it stands, what arrived and what fits.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [(_place(each["loc"], values), each) for each in error.errors(include_url=False)]
        place, first = errors[0]
        if first["type"] == "missing":
            what = f"{first['loc'][-1]} is missing"
        elif first["type"] == "extra_forbidden":
            what = "is nothing that this release knows"
        else:  # where several types fit, there is an error for each
            messages = dict.fromkeys(each["msg"].removeprefix("Value error, ") for at, each in errors if at == place)
            needs = " or ".join(messages).replace("Input should be", "needs")
            what = f"got {reprlib.repr(first['input'])}: {needs}"
        raise EtherFileError(": ".join([where, *([".".join(place)] if place else []), what])) from error


def _place(steps: Sequence[int | str], values: Any) -> list[str]:
    """The keys that lead to an error, without pydantic's names of types, which are no keys."""
    place = []
    for step in steps:
        if isinstance(values, dict) and step in values or isinstance(values, list) and isinstance(step, int):
            values = values[step]
            place.append(str(step))
    return place
