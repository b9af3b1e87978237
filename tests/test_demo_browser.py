"""The web demo in a browser, as a person uses it: Debian's Chromium, driven by Playwright."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from ether_diffusion.commands.demo import serve  # noqa: E402

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE = {"width": 390, "height": 844}
WAIT = 120_000
NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button')].filter(each =>
    each.offsetParent && !each.labels?.length && !each.ariaLabel && !each.title && !each.innerText.trim() &&
    !each.getAttribute('aria-labelledby') && !each.closest('label')).map(each => each.outerHTML.slice(0, 120))"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    args = Namespace(base=None, adapters=None, host="127.0.0.1", port=0, share=False, auth=None, device="cpu")
    page = serve(args, tmp_path_factory.mktemp("served"))
    yield page
    page.close()
    page.worker.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """open_page(**options of the context) -> the page, loaded; the addresses it asked for are in `page.asked`."""
    contexts = []

    def call(**options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 1000}} | options)
        contexts.append(context)
        page = context.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.local_url)
        page.wait_for_selector("#generate")
        page.wait_for_timeout(1000)
        return page

    yield call
    for context in contexts:
        context.close()


def says(page, place: str, text: str) -> None:
    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=WAIT)


def painted(page) -> list[bytes]:
    """The files of the gallery, as they would be downloaded."""
    sources = page.locator("#gallery .grid-wrap img").evaluate_all("images => images.map(image => image.src)")
    return [page.request.get(source).body() for source in sources]


def generate(page) -> list[bytes]:
    page.click("#generate")
    says(page, "#status", "step")
    says(page, "#status", "Done")
    page.wait_for_timeout(500)
    return painted(page)


def test_base_and_adapted_differ_and_repeat_for_the_seed(open_page):
    page = open_page()
    first = generate(page)
    assert len(first) == 2 and first[0] != first[1]
    assert generate(page) == first
    page.get_by_label("Seed", exact=True).fill("7")
    assert generate(page)[1] != first[1]
    says(page, "#status", "seed 7")
    own = page.url.split("/")[2]
    assert {url.split("/")[2] for url in page.asked if url.startswith(("http", "ws"))} == {own}


def test_a_cancelled_picture_stops_and_the_page_goes_on(open_page):
    page = open_page()
    page.get_by_text("More settings").click()
    page.get_by_role("spinbutton", name="Steps").first.fill("150")
    page.get_by_role("spinbutton", name="Steps").first.press("Enter")
    page.click("#generate")
    says(page, "#status", "of 150")
    page.click("#cancel")
    says(page, "#status", "Cancelled.")
    page.get_by_role("spinbutton", name="Steps").first.fill("25")
    assert len(generate(page)) == 2


def test_a_broken_file_is_explained_where_it_was_dropped(open_page, tmp_path):
    page = open_page()
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 a pickle")
    page.get_by_role("tab", name="Inspect and export").click()
    page.locator("#adapter-file input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    says(page, "#inspect-status", "bad.safetensors holds a pickle, whatever its name says, and pickles are not read")
    page.click("#inspect")
    says(page, "#report", "Parameters")


def test_a_picture_that_is_dropped_brings_its_settings_back(open_page, tmp_path):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.fill("a photo of sks toy on a red background")
    page.get_by_label("Seed", exact=True).first.fill("11")
    (tmp_path / "mine.png").write_bytes(generate(page)[1])
    again = open_page()
    again.get_by_text("Use the settings of a picture").click()
    again.locator("input[type=file][accept*=png]").first.set_input_files(tmp_path / "mine.png")
    says(again, "#status", "settings of mine.png")
    assert again.get_by_label("Prompt", exact=True).first.input_value() == "a photo of sks toy on a red background"
    assert again.get_by_label("Seed", exact=True).first.input_value() == "11"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_themes(open_page, scheme):
    page = open_page(viewport=PHONE, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 100")
    assert dark == (scheme == "dark")


def test_the_keyboard_alone_paints(open_page):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    says(page, "#status", "Done")


def test_every_control_has_a_name(open_page):
    page = open_page()
    nameless = page.evaluate(NAMELESS)
    assert nameless == []


def test_photos_are_shown_and_too_few_are_refused(open_page, photographs):
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    paths = [str(path) for path in sorted(Path(photographs).iterdir())]
    page.locator("#photos input[type=file]").set_input_files(paths[:2])
    page.wait_for_timeout(2000)
    page.get_by_label("Name of the adapter").fill("mine")
    page.get_by_label("What the photos show").fill("toy")
    page.click("#train")
    says(page, "#training-status", "Photos: got 2, needs 3 to 8")
