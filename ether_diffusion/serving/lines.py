"""Requests as lines of JSON: read and checked before a model is loaded, each with a file name of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ether_diffusion.control.pipelines import is_number
from ether_diffusion.errors import InputError, printable

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
HIGHEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image to generate. What is None, the pipeline decides.

    adapters: (name, strength) in the order in which they are applied.
    size: (width, height) in pixels.
    """

    prompt: str
    adapters: tuple[tuple[str, float], ...] = ()
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None

    @property
    def file_name(self) -> str:
        """The same for the same request alone."""
        content = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True)
        return f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.png"

    @property
    def arguments(self) -> dict[str, Any]:
        """As `Engine.submit` takes it."""
        width, height = self.size or (None, None)
        values = {
            "adapter": dict(self.adapters) or None,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "width": width,
            "height": height,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return {"prompt": self.prompt, "seed": self.seed, **given}


def read_lines(path: Path, defaults: Mapping[str, Any]) -> list[ImageRequest]:
    """The requests of a file with one JSON object in each line; empty lines are passed over.

    Keys of a line: prompt, and at will adapter (a name, or name -> strength), strength (of the one that is named),
    negative_prompt, seed, steps, guidance, size ("768x512", width first). A line without a seed has the default's plus
    its number, counted from 0.

    Args:
        path: of the file, UTF-8.
        defaults: values for what a line leaves out.

    Raises:
        InputError: a line that cannot be used; names the line, and what fits.
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    requests = [_read_line(line, f"{path}, line {k + 1}", defaults) for k, line in enumerate(lines) if line.strip()]
    if not requests:
        raise InputError(f'{path}: holds no line; each has a prompt, as in {{"prompt": "a dog"}}')
    return [
        request if seeded else replace(request, seed=_seed(request.seed + k, path))
        for k, (request, seeded) in enumerate(requests)
    ]


def make_request(values: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> ImageRequest:
    """A request of the values of one line. Raises `InputError`, which begins with `where`."""
    unknown = sorted(set(values) - CHECKS.keys() - {"adapter", "strength"})
    if unknown:
        known = ", ".join([*CHECKS, "adapter", "strength"])
        raise InputError(f"{where}: {printable(', '.join(unknown))}: there is no such key; there are {known}")
    own = {name: value for name, value in values.items() if value is not None}
    if "prompt" not in own:
        raise InputError(f"{where}: has no prompt")
    adapters = _adapters(own.pop("adapter", None), own.pop("strength", None), where)
    checked = {name: CHECKS[name](value, where) for name, value in {**defaults, **own}.items() if value is not None}
    return ImageRequest(**checked, adapters=adapters)


def _read_line(line: str, where: str, defaults: Mapping[str, Any]) -> tuple[ImageRequest, bool]:
    """The request, and whether it has a seed of its own."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f'{where}: is no JSON object, as in {{"prompt": "a dog"}}')
    return make_request(values, where, defaults), values.get("seed") is not None


def _adapters(adapter: Any, strength: Any, where: str) -> tuple[tuple[str, float], ...]:
    if adapter is None or isinstance(adapter, dict):
        if strength is not None:
            raise InputError(f"{where}: strength is that of the one adapter that is named; here none is")
        pairs = [*(adapter or {}).items()]
    elif isinstance(adapter, str):
        pairs = [(adapter, 1.0 if strength is None else strength)]
    else:
        raise InputError(f"{where}: adapter: got {printable(str(adapter))}, needs a name, or names with strengths")
    for name, value in pairs:
        if not is_number(value):
            raise InputError(f"{where}: strength of {printable(name)}: got {value!r}, needs a finite number")
    return tuple((name, float(value)) for name, value in pairs)


def _text(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str) or (name == "prompt" and not value.strip()):
        raise InputError(f"{where}: {name}: got {value!r}, needs a text")
    return value


def _whole(name: str, value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{where}: {name}: got {value!r}, needs a whole number from {low} to {high}")
    return value


def _guidance(value: Any, where: str) -> float:
    if not is_number(value):
        raise InputError(f"{where}: guidance: got {value!r}, needs a finite number")
    return float(value)


def _size(value: Any, where: str) -> tuple[int, int]:
    found = SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise InputError(f'{where}: size: got {value!r}, needs width and height in pixels, as "768x512"')
    return int(found[1]), int(found[2])


def _seed(value: Any, where: object) -> int:
    return _whole("seed", value, str(where), 0, HIGHEST_SEED)


CHECKS = {
    "prompt": lambda value, where: _text("prompt", value, where),
    "negative_prompt": lambda value, where: _text("negative_prompt", value, where),
    "seed": _seed,
    "steps": lambda value, where: _whole("steps", value, where, 1, 10_000),
    "guidance": _guidance,
    "size": _size,
}
"""Key of a line -> what checks its value."""


def shard(requests: Sequence[ImageRequest], process: int, processes: int) -> list[ImageRequest]:
    """The part of one process of several: process k has the lines k, k + n, k + 2n …; a request given twice once."""
    return list(dict.fromkeys(requests))[process::processes]


def adapter_names(requests: Iterable[ImageRequest]) -> list[str]:
    """All adapters that are asked for, in order."""
    return sorted({name for request in requests for name, _ in request.adapters})
