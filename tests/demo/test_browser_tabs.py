"""Generating, training, inspecting and controlling in a browser, as a person does it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.browser import CHROMIUM, WAIT, enter, says
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")

from ether_diffusion import EtherControlPipeline, miniature  # noqa: E402
from ether_diffusion.commands.demo import SHIPPED  # noqa: E402
from ether_diffusion.demo.settings import read_image  # noqa: E402

NAMELESS = """() => [...document.querySelectorAll('input, textarea, select, button')].filter(each =>
    each.offsetParent && !each.labels?.length && !each.ariaLabel && !each.title && !each.innerText.trim() &&
    !each.getAttribute('aria-labelledby') && !each.closest('label')).map(each => each.outerHTML.slice(0, 120))"""

LISTEN = """() => { window.told = []; new MutationObserver(() => {
    window.told.push(document.querySelector('#generate-status').innerText);
}).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
GENERATED = "() => told.some(each => each.includes('step')) && told.at(-1).includes('Done')"
SHOWN = "(images) => images.length > 0 && images.every(each => each.complete && each.naturalWidth > 0)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium"),
]


def generated(page, gallery: str = "#generate-images") -> list[bytes]:
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
    says(page, "#generate-status", "seed 7")
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
    page.click("#control")
    says(page, "#control-status", "Done")
    base, steered = generated(page, "#control-images")
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
    page.click("#control")
    says(page, "#control-status", "Done")
    (tmp_path / "steered.png").write_bytes(generated(page, "#control-images")[1])
    again = open_page()
    again.get_by_role("tab", name="Control").click()
    again.locator("#map-prompt textarea").fill("something else")
    again.get_by_text("Use the settings and the map of an image").click()
    again.locator("#map-settings input[type=file]").set_input_files(tmp_path / "steered.png")
    says(again, "#control-status", "the map of steered.png")
    editor_draws(again)
    again.click("#control")
    says(again, "#control-status", "Done")
    assert generated(again, "#control-images")[1] == (tmp_path / "steered.png").read_bytes()


def test_photos_are_cropped_trained_on_and_used(open_page, photographs):
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    paths = [str(path) for path in sorted(Path(photographs).iterdir())]
    page.locator("#photos input[type=file]").first.set_input_files(paths)
    sync_api.expect(page.locator("#photos .grid-wrap img")).to_have_count(3, timeout=WAIT)
    page.locator("#photos .grid-wrap button img").nth(1).click()
    sync_api.expect(page.locator("#cropping")).to_be_visible(timeout=WAIT)
    page.locator("#crop canvas").first.wait_for(timeout=WAIT)
    page.wait_for_timeout(2000)
    page.locator("#keep-crop").press("Enter")
    sync_api.expect(page.locator("#cropping")).to_be_hidden(timeout=WAIT)
    sources = page.locator("#photos .grid-wrap img").evaluate_all("images => images.map(image => image.src)")
    assert "-cut" in sources[1] and len(sources) == 3
    page.get_by_label("Name of the adapter").fill("mine")
    page.get_by_label("What the photos show").fill("toy")
    page.click("#train")
    says(page, "#train-status", "left")
    page.reload()  # the training outlives the page
    page.wait_for_selector("#tabs button[role=tab]", timeout=WAIT)
    page.get_by_role("tab", name="Train").click()
    says(page, "#train-status", "Done: the adapter mine is in the list")
    page.locator("#keep-step").get_by_label("100").check()
    says(page, "#train-status", "mine is what it was after step 100.")
    page.click("#use-now")
    sync_api.expect(page.locator("#adapters")).to_contain_text("mine", timeout=WAIT)
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a photo of sks toy", timeout=WAIT)
    base, adapted = generate(page)
    assert pixels(base) != pixels(adapted)


def test_a_drawn_subject_is_offered_where_the_base_knows_no_photographs(open_page):
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    sync_api.expect(page.locator("#examples")).to_contain_text("photographs become mush", timeout=WAIT)
    page.get_by_role("button", name="A drawn house").click()
    sync_api.expect(page.locator("#photos .grid-wrap img")).to_have_count(5, timeout=WAIT)
    assert page.get_by_label("What the photos show").input_value() == "house"


def test_the_place_in_line_is_shown_and_a_cancelled_image_stops(open_page):
    page, other = open_page(), open_page()
    page.get_by_text("More settings").first.click()
    enter(page, "Steps", "150")
    page.click("#generate")
    says(page, "#generate-status", "of 150")
    other.click("#generate")
    says(other, "#generate-status", "In line: 1 job is before yours.")
    page.click("#generate-cancel")
    says(page, "#generate-status", "Cancelled.")
    says(other, "#generate-status", "Done")
    enter(page, "Steps", "25")
    assert len(generate(page)) == 2


def test_a_click_chooses_an_adapter_and_its_prompt(open_page):
    page = open_page()
    page.locator("#adapter-filter textarea, #adapter-filter input").first.fill("house")
    sync_api.expect(page.locator("#adapter-gallery .grid-wrap img")).to_have_count(1, timeout=WAIT)
    page.locator("#adapter-gallery .thumbnail-item").first.press("Enter")
    sync_api.expect(page.locator("#adapters")).to_contain_text("house-1", timeout=WAIT)
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a photo of qwe house", timeout=WAIT)


def test_strengths_stand_side_by_side_and_the_history_has_them(open_page):
    page = open_page()
    page.get_by_label("Strengths side by side").check()
    assert len(generate(page)) == 7
    page.get_by_text("Images of today").click()
    sync_api.expect(page.locator("#history .grid-wrap img")).to_have_count(7, timeout=WAIT)
    with page.expect_download() as download:
        page.locator("#history-download").click()
    assert download.value.suggested_filename == "ether-images.zip"


def test_an_adapter_is_looked_into_and_downloaded_at_one_click(open_page):
    page = open_page()
    page.get_by_role("tab", name="Inspect and export").click()
    page.locator("#inspected input").click()
    page.get_by_role("option", name="toy-1").click()
    says(page, "#inspect-status", "Moved moderately: ")
    says(page, "#facts", "Parameters")
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "toy-1.safetensors"


def test_a_broken_file_is_explained_where_it_was_dropped(open_page, tmp_path):
    page = open_page()
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 a pickle")
    page.get_by_role("tab", name="Inspect and export").click()
    page.get_by_text("A file of your own").click()
    page.locator("#adapter-file input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    says(page, "#inspect-status", "bad.safetensors holds a pickle, whatever its name says, and pickles are not read")


def test_an_image_that_is_dropped_brings_its_settings_back(open_page, tmp_path):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.fill("a photo of sks toy on a red background")
    page.get_by_label("Seed", exact=True).first.fill("11")
    (tmp_path / "mine.png").write_bytes(generate(page)[1])
    again = open_page()
    again.get_by_text("Use the settings of an image").click()
    again.locator("#settings-of input[type=file]").set_input_files(tmp_path / "mine.png")
    says(again, "#generate-status", "settings of mine.png")
    assert again.get_by_label("Prompt", exact=True).first.input_value() == "a photo of sks toy on a red background"
    assert again.get_by_label("Seed", exact=True).first.input_value() == "11"


def test_every_control_has_a_name(open_page):
    page = open_page()
    nameless = page.evaluate(NAMELESS)
    assert nameless == []


def test_too_few_photos_are_refused_where_the_button_is(open_page, photographs):
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    paths = [str(path) for path in sorted(Path(photographs).iterdir())]
    page.locator("#photos input[type=file]").first.set_input_files(paths[:2])
    sync_api.expect(page.locator("#photos .grid-wrap img")).to_have_count(2, timeout=WAIT)
    page.get_by_label("Name of the adapter").fill("mine")
    page.get_by_label("What the photos show").fill("toy")
    page.click("#train")
    says(page, "#train-status", "Photos: got 2, needs 3 to 8")
