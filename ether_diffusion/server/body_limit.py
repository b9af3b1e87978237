"""How large the body of a request may be, held to while it arrives."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ether_diffusion.server.errors import ApiError


class BodyLimit:
    """ASGI middleware that answers 413 to a body that is too large, whether it says so or not.

    Args:
        app: what it is around.
        limit: method and path -> bytes.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[str, str], int]) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["method"], scope["path"])
        told = dict(scope["headers"]).get(b"content-length", b"")
        message = f"the body is too large; {limit:,} bytes fit"
        if told.isdigit() and int(told) > limit:
            await ApiError(413, message, code="too_large").response()(scope, receive, send)
            return
        arrived = 0

        async def receive_counted() -> Message:
            nonlocal arrived
            received = await receive()
            arrived += len(received.get("body", b""))
            if arrived > limit:
                raise HTTPException(413, message)
            return received

        await self._app(scope, receive_counted, send)
