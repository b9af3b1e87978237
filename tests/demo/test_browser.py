"""The web demo in a browser, as a person uses it: Debian's Chromium, driven by Playwright."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")

from ether_diffusion import EtherControlPipeline, miniature  # noqa: E402
from ether_diffusion.commands.demo import SHIPPED  # noqa: E402
from ether_diffusion.demo.settings import read_image  # noqa: E402

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE = {"width": 390, "height": 844}
WAIT = 300_000
NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button')].filter(each =>
    each.offsetParent && !each.labels?.length && !each.ariaLabel && !each.title && !each.innerText.trim() &&
    !each.getAttribute('aria-labelledby') && !each.closest('label')).map(each => each.outerHTML.slice(0, 120))"""

LISTEN = """() => { window.told = []; new MutationObserver(() => {
    window.told.push(document.querySelector('#status').innerText);
}).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
GENERATED = "() => told.some(each => each.includes('step')) && told.at(-1).includes('Done')"
SHOWN = "(images) => images.length > 0 && images.every(each => each.complete && each.naturalWidth > 0)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium"),
]


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
        says(page, "#listing", "toy-1")
        page.wait_for_timeout(1000)
        return page

    yield call
    for context in contexts:
        context.close()


def says(page, place: str, text: str) -> None:
    sync_api.expect(page.locator(place)).to_contain_text(text, timeout=WAIT)


def enter(page, label: str, number: str) -> None:
    box = page.get_by_role("spinbutton", name=label).first
    box.fill(number)
    box.press("Enter")


def generated(page, gallery: str = "#gallery") -> list[bytes]:
    """The files of a gallery, as they would be downloaded."""
    page.wait_for_timeout(500)
    images = f"[...document.querySelectorAll('{gallery} .grid-wrap img')]"
    page.wait_for_function(f"() => ({SHOWN})({images})", timeout=WAIT)
    sources = page.locator(f"{gallery} .grid-wrap img").evaluate_all("images => images.map(image => image.src)")
    return [page.request.get(source).body() for source in sources]


def pixels(content: bytes) -> list:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).tolist()


def editor_draws(page) -> None:
    page.locator("#map canvas").first.wait_for(timeout=WAIT)
    page.wait_for_timeout(3000)


def generate(page) -> list[bytes]:
    page.evaluate(LISTEN)  # a step may be gone before anybody looks
    page.click("#generate")
    page.wait_for_function(GENERATED, timeout=WAIT)
    return generated(page)


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


def test_strength_zero_is_the_base(open_page):
    page = open_page()
    enter(page, "Strength of toy-1", "0")
    base, adapted = generate(page)
    assert pixels(base) == pixels(adapted) and base != adapted  # the settings in them differ


def test_the_control_tab_generates_its_sample_at_one_click(open_page, server, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Control").click()
    editor_draws(page)
    page.click("#generate-map")
    says(page, "#control-status", "Done")
    base, steered = generated(page, "#map-gallery")
    (tmp_path / "steered.png").write_bytes(steered)
    settings, control = read_image(tmp_path / "steered.png")
    # The map went through the browser's canvas; what comes of it is what the pipeline itself generates.
    _, sample = read_image(server.worker.library.get("scene-map").image)
    assert np.array_equal(np.asarray(control.convert("RGB")), np.asarray(sample.convert("RGB")))
    pipe = EtherControlPipeline.from_pretrained(miniature.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ether_weights(SHIPPED / "scene-map")
    (expected,) = pipe(
        settings.prompt,
        control_image=sample,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
    ).images
    assert pixels(steered) == np.asarray(expected).tolist() != pixels(base)


def test_a_map_that_is_uploaded_steers_and_comes_back(open_page, tmp_path):
    page = open_page()
    page.get_by_role("tab", name="Control").click()
    Image.fromarray(np.kron(np.eye(4, dtype=np.uint8) * 200, np.ones((32, 32), np.uint8))).save(tmp_path / "map.png")
    page.locator("#map input[type=file]").first.set_input_files(tmp_path / "map.png")
    editor_draws(page)
    page.click("#generate-map")
    says(page, "#control-status", "Done")
    (tmp_path / "steered.png").write_bytes(generated(page, "#map-gallery")[1])
    again = open_page()
    again.get_by_role("tab", name="Control").click()
    again.locator("#map-prompt textarea").fill("something else")
    again.get_by_text("Use the settings and the map of an image").click()
    again.locator("#map-settings input[type=file]").set_input_files(tmp_path / "steered.png")
    says(again, "#control-status", "the map of steered.png")
    editor_draws(again)
    again.click("#generate-map")
    says(again, "#control-status", "Done")
    assert generated(again, "#map-gallery")[1] == (tmp_path / "steered.png").read_bytes()


def test_photos_are_cut_trained_on_and_generated_with(open_page, photographs):
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    paths = [str(path) for path in sorted(Path(photographs).iterdir())]
    page.locator("#photos input[type=file]").set_input_files(paths)
    # By keyboard alone: choose the second photo, make its square smaller and move it.
    page.locator("#uploaded .grid-wrap button").nth(1).press("Enter")
    whole = page.locator("#cut img").get_attribute("src", timeout=WAIT)
    sliders = page.locator("#cropping input[type=range]")
    for slider, key in ((0, "ArrowLeft"), (1, "ArrowRight"), (2, "ArrowLeft")):
        for _ in range(10):
            sliders.nth(slider).press(key)
    sync_api.expect(page.locator("#cut img")).not_to_have_attribute("src", whole, timeout=WAIT)
    page.locator("#keep-cut").press("Enter")
    sync_api.expect(page.locator("#cropping")).to_be_hidden(timeout=WAIT)
    sync_api.expect(page.locator("#photos")).to_contain_text("-cut", timeout=WAIT)
    page.get_by_label("Name of the adapter").fill("mine")
    page.get_by_label("What the photos show").fill("toy")
    page.click("#train")
    says(page, "#training-status", "left")
    says(page, "#training-status", "Done: the adapter mine is in the list")
    page.get_by_role("tab", name="Generate").click()
    says(page, "#listing", "mine")
    page.locator("#adapters input").click()
    page.get_by_role("option", name="mine").click()
    page.keyboard.press("Escape")
    enter(page, "Strength of toy-1", "0")
    base, adapted = generate(page)
    assert pixels(base) != pixels(adapted)


def test_the_place_in_line_is_shown_and_a_cancelled_image_stops(open_page):
    page, other = open_page(), open_page()
    page.get_by_text("More settings").click()
    enter(page, "Steps", "150")
    page.click("#generate")
    says(page, "#status", "of 150")
    other.click("#generate")
    says(other, "#status", "queue: 1/1")
    page.click("#cancel")
    says(page, "#status", "Cancelled.")
    says(other, "#status", "Done")
    enter(page, "Steps", "25")
    assert len(generate(page)) == 2


def test_a_broken_file_is_explained_where_it_was_dropped(open_page, tmp_path):
    page = open_page()
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 a pickle")
    page.get_by_role("tab", name="Inspect and export").click()
    page.locator("#adapter-file input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    says(page, "#inspect-status", "bad.safetensors holds a pickle, whatever its name says, and pickles are not read")
    page.click("#inspect")
    says(page, "#report", "Parameters")


def test_an_image_that_is_dropped_brings_its_settings_back(open_page, tmp_path):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.fill("a photo of sks toy on a red background")
    page.get_by_label("Seed", exact=True).first.fill("11")
    (tmp_path / "mine.png").write_bytes(generate(page)[1])
    again = open_page()
    again.get_by_text("Use the settings of an image").click()
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


def test_the_keyboard_alone_generates(open_page):
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
    sync_api.expect(page.locator("#uploaded .grid-wrap img")).to_have_count(2, timeout=WAIT)
    page.get_by_label("Name of the adapter").fill("mine")
    page.get_by_label("What the photos show").fill("toy")
    page.click("#train")
    says(page, "#training-status", "Photos: got 2, needs 3 to 8")
