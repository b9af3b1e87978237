"""Inputs that went wrong: bytes and JSON with a few changes, drawn from a generator."""

import copy
import json
import random
from typing import Any

ODD = [
    None, True, False, 0, 1, -1, 3, 0.5, 2**31, 2**64, 1e308, float("nan"), float("inf"), "", " ", "8", "a\nb",
    "\u2028", "\x00", "\ud800", "é" * 300, "../..", "/", [], {}, [None], [8, 8], [[1]], {"a": 1}, ["a", 1],
]  # fmt: skip


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """The same bytes but for one to six changes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(min(len(changed), draw.choice([16, 64, len(changed)])) or 1)
        length = draw.choice([1, 1, 2, 4, 16, 200])
        kind = draw.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = draw.randbytes(length)
        elif kind == 4:
            changed[at : at + length] = draw.choice([b"\x00", b"\xff", b"\x7f\xff"]) * length
        else:
            changed[at:at] = changed[at : at + length]
    return bytes(changed)


def changed_json(value: Any, draw: random.Random) -> Any:
    """The same value but for one or two places, which are odd, gone, or under another name."""
    changed = copy.deepcopy(value)
    for _ in range(draw.randint(1, 2)):
        place = changed
        while isinstance(place, (dict, list)) and place:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
                place = place[key]
                continue
            kind = draw.random()
            if kind < 0.15:
                del place[key]
            elif kind < 0.25 and isinstance(place, dict):
                place[str(key) + draw.choice(["s", " ", "_"])] = place.pop(key)
            else:
                place[key] = copy.deepcopy(draw.choice(ODD))
            break
    return changed if draw.random() < 0.97 else draw.choice(ODD)


def changed_text(text: str, draw: random.Random) -> bytes:
    """A JSON text that was changed as a value, or as bytes."""
    if draw.random() < 0.3:
        return changed_bytes(text.encode(), draw)
    return json.dumps(changed_json(json.loads(text), draw)).encode()
