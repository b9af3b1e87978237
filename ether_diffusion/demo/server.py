"""Serving the page: its theme, what the server lets through, and what it refuses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

MAX_UPLOAD = "20mb"
MAX_UPLOAD_BYTES = 200_000_000
"""Of all that is sent at once."""
MAX_PIXELS = 40_000_000
"""Of an image; Pillow refuses what has twice as many."""
LONGEST_LINE = 64
"""Requests that wait at the same time, for whatever."""
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
CSS = """
.gradio-container { max-width: 1200px !important; }
.ether-cards { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.ether-cards li { display: flex; gap: 12px; margin: 0; padding: 10px; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); }
.ether-cards img { width: 72px; height: 72px; object-fit: cover; border-radius: 6px; image-rendering: pixelated; }
.ether-cards div { min-width: 0; overflow-wrap: anywhere; }
.ether-status, .ether-problem { padding: 8px 10px; border-radius: 6px; overflow-wrap: anywhere; }
.ether-status { background: var(--block-background-fill); }
.ether-status progress { display: block; width: 100%; margin-top: 6px; accent-color: var(--color-accent); }
.ether-problem { border: 2px solid #b91c1c; color: var(--body-text-color); }
#gallery img, .ether-preview img { image-rendering: pixelated; }
.grid-wrap { padding-top: 40px !important; }
.ether-samples img { padding-top: 36px; }
button.primary:hover { background: var(--primary-700); }
.ether-preview img { width: 100%; height: 100%; object-fit: contain; }
.ether-preview:not(:has(img)) { display: none !important; }
#map-gallery img { image-rendering: pixelated; }
.ether-line .error, .ether-line .clear-status { display: none; }
.ether-note { font-size: 0.85em; }
.gradio-container { --block-info-text-color: var(--body-text-color); }
"""


def launch(page: gr.Blocks, **options: Any) -> tuple[Any, str, str | None]:
    """Serve the page; `options` are those of Gradio's `launch`."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    page.queue(max_size=LONGEST_LINE, default_concurrency_limit=4)
    return page.launch(
        theme=gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=["api"],
        app_kwargs={"middleware": [Middleware(Guard)]},
        quiet=True,
        **options,
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

        async def guarded(message: dict) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        return await self.app(scope, receive, guarded)


async def _refuse(send: Callable, status: int, words: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})
