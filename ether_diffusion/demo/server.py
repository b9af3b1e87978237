"""Serving the page: its theme, what the server lets through, and what it refuses."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

MAX_UPLOAD = "20mb"
MAX_UPLOAD_BYTES = 200_000_000
"""Of all that is sent at once."""
MAX_PIXELS = 40_000_000
"""Of an image; Pillow refuses what has twice as many."""
MOST_EVENTS = 64
"""Requests that wait at the same time, for whatever."""
OWNER = "ether-owner"
COOKIE = "Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax"
MOST_FOLLOWERS = 256
"""Pages that are told of their jobs at the same time: each takes a thread."""
FONTS = ["system-ui", "sans-serif"]
SECURITY_HEADERS = {
    # Nothing is fetched from anywhere else, whatever a part of the page would like.
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "media-src 'self' data: blob:; object-src 'none'; frame-ancestors 'self'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
CSS, HEAD = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.html"))


def launch(page: gr.Blocks, **options: Any) -> tuple[Any, str, str | None]:
    """Serve the page; `options` are those of Gradio's `launch`."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    page.queue(max_size=MOST_EVENTS, default_concurrency_limit=4)
    return page.launch(
        theme=_theme(),
        css=CSS,
        head=HEAD,
        max_threads=MOST_FOLLOWERS,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=["api"],
        app_kwargs={"middleware": [Middleware(Guard)]},
        quiet=True,
        **options,
    )


def _theme() -> gr.themes.Base:
    """Plain labels in place of filled pills, and nothing that is told by a faint colour alone."""
    text = "*body_text_color"
    return gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"]).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color=text,
        block_title_text_color_dark=text,
        block_title_text_weight="600",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_text_color=text,
        block_label_text_color_dark=text,
        block_label_text_weight="600",
        block_label_padding="0",
        block_info_text_color=text,
        block_info_text_color_dark=text,
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_cancel_background_fill="*neutral_200",
        button_cancel_background_fill_dark="*neutral_700",
        button_cancel_text_color=text,
        button_cancel_text_color_dark=text,
    )


class Guard:
    """ASGI middleware: headers that keep the page to itself, and no fetching of addresses on somebody's behalf."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if "file=http" in scope["path"].lower() or scope["path"].startswith("/gradio_api/proxy="):
            return await _refuse(send, 403, "only files of this server are served")
        if scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length) > MAX_UPLOAD_BYTES:
                return await _refuse(
                    send, 413, f"{MAX_UPLOAD_BYTES:,} bytes at most fit, and their number must be told"
                )

        is_new = OWNER not in SimpleCookie(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))

        async def guarded(message: dict) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                if is_new and scope["path"] == "/":
                    ours.append((b"set-cookie", f"{OWNER}={secrets.token_urlsafe(16)}; {COOKIE}".encode()))
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        return await self.app(scope, receive, guarded)


def owner_of(request: gr.Request) -> str:
    """Who asks: a random name that the browser keeps as a cookie, or its session's where it keeps none."""
    cookies = SimpleCookie(dict(request.headers).get("cookie", ""))
    return cookies[OWNER].value if OWNER in cookies else str(request.session_hash)


async def _refuse(send: Callable, status: int, words: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})
