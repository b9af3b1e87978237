"""Tokens: who may ask, who asks, and how much each may ask for at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ether_diffusion.errors import InputError
from ether_diffusion.server.errors import ApiError

SHORTEST = 16


def read_tokens(path: Path) -> frozenset[str]:
    """The tokens of a file: one in each line; lines that are empty or begin with # are passed over.

    Raises:
        InputError: a line that can be no token; names its number, never what is in it.
        OSError: the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text in UTF-8") from error
    tokens = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        if len(line) < SHORTEST or not (line.isascii() and line.isprintable()) or " " in line:
            raise InputError(f"{path}, line {number}: a token has {SHORTEST} or more ASCII characters without spaces")
        if line in tokens:
            raise InputError(f"{path}, line {number}: the token of line {tokens[line]} again")
        tokens[line] = number
    if not tokens:
        raise InputError(f"{path}: holds no token; each is a line")
    return frozenset(tokens)


class Clients:
    """Those who may ask, each known by a digest of its token, and the images that each has in line or running.

    Args:
        tokens: empty lets everybody in, as one client without a limit of its own.
        limit: images of a token at a time.
    """

    def __init__(self, tokens: frozenset[str], limit: int) -> None:
        # Looking up a digest takes no time that would tell how much of a guessed token is right.
        self._digests = {_digest(token) for token in tokens}
        self._limit = limit
        self._taken: Counter[str] = Counter()

    def identify(self, authorization: str | None) -> str:
        """The client of an `Authorization` header; "" where no token is needed.

        Raises:
            ApiError: 401, no token or an unknown one.
        """
        if not self._digests:
            return ""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, 'a token is needed, as "Authorization: Bearer …"', code="missing_api_key")
        digest = _digest(token.strip())
        if digest not in self._digests:
            raise ApiError(401, "this token is not known", code="invalid_api_key")
        return digest

    @contextmanager
    def taking(self, client: str, images: int, *, retry_after: int) -> Iterator[None]:
        """Count these images as the client's while they are made.

        Raises:
            ApiError: 429, they are more than it may have at a time.
        """
        if client and self._taken[client] + images > self._limit:
            raise ApiError(
                429,
                f"{self._taken[client]} images of this token are in line or running, and {images} more were asked "
                f"for; {self._limit} at a time fit",
                code="token_limit",
                retry_after=retry_after,
            )
        self._taken[client] += images
        try:
            yield
        finally:
            self._taken[client] -= images
            if not self._taken[client]:
                del self._taken[client]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()[:32]
