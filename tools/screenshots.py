"""Screenshots of every tab of the page, in three widths, light and dark, each after a job of its own.

  python tools/screenshots.py --output_dir out/screenshots
  python tools/screenshots.py --output_dir out/screenshots --docs docs    # renews the page's image in the docs

Needs Chromium and the package playwright. The page runs on the miniature; nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright import sync_api

WIDTHS = {390: 844, 1280: 900, 1920: 1080}
SCHEMES = ("light", "dark")
TABS = ("Generate", "Train", "Inspect and export", "Control")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
JOBS = {"Generate": "generate", "Control": "control"}
WAIT = 300_000
DOCS_IMAGE = ("Generate", 1280, "light", "demo.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the PNGs go.")
    parser.add_argument("--docs", type=Path, help="Folder whose demo.png is renewed.")
    parser.add_argument("--train", action="store_true", help="Also train on the page first: takes about a minute.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    command = [Path(sys.executable).with_name("ether-diffusion"), "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        try:
            address = next(found[0] for line in demo.stdout if (found := re.search(r"http://\S+", line)))
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
                for width, height in WIDTHS.items():
                    for scheme in SCHEMES:
                        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                        take(context.new_page(), address, args, width, scheme)
                        context.close()
                browser.close()
        finally:
            demo.terminate()


def take(page: Any, address: str, args: argparse.Namespace, width: int, scheme: str) -> None:
    """All tabs at one width and in one theme."""
    page.goto(address)
    page.wait_for_selector("#generate", timeout=WAIT)
    page.wait_for_timeout(1500)
    for tab in TABS:
        page.evaluate("(name) => window.etherOpen(name)", tab)
        page.wait_for_timeout(2500)
        if job := JOBS.get(tab) or ("train" if tab == "Train" and args.train else None):
            if job == "train":
                page.locator(".ether-example button, #examples button").first.click()
                page.wait_for_timeout(1500)
            page.click(f"#{job}")
            done = page.locator(f"#{job}-status")
            sync_api.expect(done).to_contain_text("Done", timeout=WAIT)
            page.wait_for_timeout(1500)
        name = f"{tab.split()[0].lower()}-{width}-{scheme}.png"
        page.screenshot(path=args.output_dir / name, full_page=True)
        print(name, flush=True)
        if args.docs is not None and (tab, width, scheme) == DOCS_IMAGE[:3]:
            page.screenshot(path=args.docs / DOCS_IMAGE[3])


if __name__ == "__main__":
    main()
