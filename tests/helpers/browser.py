"""A browser as a person has one: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT = 300_000


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser, which goes when the block ends."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def opener(browser: Any, home: str) -> Iterator[Callable[..., Any]]:
    """opener(address, **options of the context) -> the page, loaded; what it asked for is in its `asked`."""
    contexts = []

    def call(address: str = home, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 1000}} | options)
        contexts.append(context)
        page = context.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#tabs button[role=tab]", timeout=WAIT)
        page.wait_for_timeout(2000)
        return page

    yield call
    for context in contexts:
        context.close()


def says(page: Any, place: str, text: str) -> None:
    from playwright import sync_api

    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=WAIT)


def enter(page: Any, label: str, number: str) -> None:
    """Type into the first box of numbers of this label."""
    box = page.get_by_role("spinbutton", name=label).first
    box.fill(number)
    box.press("Enter")
