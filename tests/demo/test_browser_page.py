"""The page as a whole in a browser: its layout, its rules of accessibility, and jobs that outlive it."""

from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, WAIT, enter, says

from ether_diffusion.demo.page import TABS

sync_api = pytest.importorskip("playwright.sync_api")

AXE = Path(__file__).parents[2] / ".venv" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PHONE, DESKTOP, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 900}, {"width": 1920, "height": 1080}
SERIOUS = ("serious", "critical")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium"),
]


def long_job(page) -> None:
    """Start one that takes a few seconds."""
    page.get_by_text("More settings").first.click()
    enter(page, "Steps", "150")
    page.click("#generate")
    says(page, "#generate-status", "of 150")


def open_tab(page, name: str) -> None:
    tab = page.get_by_role("tab", name=name)
    if not tab.first.is_visible():  # behind the button with the rest
        page.locator("#tabs .overflow-menu button").first.click()
        tab = page.locator("#tabs .overflow-dropdown button", has_text=name)
    tab.first.click()
    page.wait_for_timeout(1000)


def test_a_reload_and_a_second_device_find_the_running_job_and_its_result(open_page):
    page = open_page()
    long_job(page)
    assert page.locator("#generate").is_hidden() and page.locator("#generate-cancel").is_visible()
    address = page.url
    assert "job=" in address
    page.reload()
    says(page, "#generate-status", "of 150")
    other = open_page(address)
    says(other, "#generate-status", "of 150")
    for each in (page, other):
        says(each, "#generate-status", "Done")
        sync_api.expect(each.locator("#generate")).to_be_visible()
        assert each.locator("#generate-images .grid-wrap img").count() == 2
    stranger = open_page()
    sync_api.expect(stranger.locator("#generate-status")).to_contain_text("Ready", timeout=WAIT)


def test_a_job_that_was_cancelled_elsewhere_is_told_so(open_page):
    page = open_page()
    long_job(page)
    other = open_page(page.url)
    says(other, "#generate-status", "of 150")
    other.click("#generate-cancel")
    for each in (page, other):
        says(each, "#generate-status", "Cancelled.")
        sync_api.expect(each.locator("#generate")).to_be_visible()


def test_back_goes_to_the_tab_before_and_a_link_opens_one(open_page):
    page = open_page()
    for tab in TABS[1:]:
        open_tab(page, tab)
    page.go_back()
    selected = page.locator("#tabs button[role=tab][aria-selected=true]")
    sync_api.expect(selected).to_contain_text(TABS[2])
    page.go_back()
    sync_api.expect(selected).to_contain_text(TABS[1])
    linked = open_page(page.url)
    sync_api.expect(linked.locator("#tabs button[role=tab][aria-selected=true]")).to_contain_text(TABS[1])


def test_the_theme_is_remembered(open_page):
    page = open_page(color_scheme="light")
    page.click("#theme")
    assert "dark" in page.locator("body").get_attribute("class")
    page.reload()
    page.wait_for_selector("#generate")
    sync_api.expect(page.locator("body.dark")).to_have_count(1, timeout=WAIT)


def test_an_error_is_told_once_and_goes_with_the_next_success(open_page):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.fill("")
    page.click("#generate")
    says(page, "#generate-status", "Prompt: is empty")
    assert page.locator("text=Prompt: is empty").count() == 1
    page.get_by_label("Prompt", exact=True).first.fill("a toy")
    page.click("#generate")
    says(page, "#generate-status", "Done")
    assert page.locator("text=Prompt: is empty").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP, WIDE], ids=lambda size: str(size["width"]))
def test_every_tab_fits_the_window(open_page, size, scheme):
    page = open_page(viewport=size, color_scheme=scheme)
    for tab in TABS:
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], tab
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 100")
    assert dark == (scheme == "dark")


def test_on_a_phone_the_result_is_where_the_finger_is(open_page):
    page = open_page(viewport=PHONE)
    page.click("#generate")
    says(page, "#generate-status", "Done")
    button, status = (page.locator(each).bounding_box() for each in ("#generate", "#generate-status"))
    assert 0 < status["y"] - button["y"] < PHONE["height"] / 3


def test_a_wide_window_is_used(open_page):
    page = open_page(viewport=WIDE)
    controls, results = (
        page.locator(f".ether-tab:visible .ether-{each}").first.bounding_box() for each in ("controls", "results")
    )
    assert results["width"] > 2 * controls["width"]
    left, right = controls["x"], WIDE["width"] - results["x"] - results["width"]
    assert abs(left - right) < 40  # centred


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not there; make axe")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=lambda size: str(size["width"]))
def test_axe_finds_nothing_serious_on_any_tab(open_page, size, scheme):
    page = open_page(viewport=size, color_scheme=scheme)
    page.click("#generate")
    says(page, "#generate-status", "Done")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = []
    for tab in TABS:
        open_tab(page, tab)
        result = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{tab}: {each['id']}: {node['html'][:150]} {node['failureSummary'][:200]}"
            for each in result["violations"]
            if each["impact"] in SERIOUS
            for node in each["nodes"]
        ]
    assert found == []


def test_the_keyboard_alone_generates(open_page):
    page = open_page()
    page.get_by_label("Prompt", exact=True).first.focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    says(page, "#generate-status", "Done")
