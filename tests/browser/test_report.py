"""The HTML report in a browser."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from starseg.config import parse_config
from starseg.engine.runner import train
from starseg.report.page import write_report

pytestmark = pytest.mark.browser
QUIET = Console(quiet=True)
CLIP = "slider => getComputedStyle(slider.parentElement.querySelector('.layers img + img')).clipPath"
SMALL_TARGETS = """() => [...document.querySelectorAll('input, summary')]
    .map(e => e.getBoundingClientRect()).filter(r => r.height && r.height < 24).length"""

CUT_OFF = """() => [...document.querySelectorAll('caption, h1, h2, h3, p, figcaption, .case')]
    .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.textContent)"""


@pytest.fixture(scope="module")
def report(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page of a tiny run."""
    folder = tmp_path_factory.mktemp("report")
    run = train(parse_config(tiny_tree | {"out": str(folder / "run")}), console=QUIET)
    write_report([run, run], folder / "report.html", QUIET)
    return (folder / "report.html").as_uri()


def test_the_slider_wipes_by_keyboard_and_by_mouse(visit: Any, report: str) -> None:
    page = visit(report)
    slider = page.get_by_role("slider").first
    assert slider.evaluate(CLIP) == "inset(0px 0px 0px 50%)"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.evaluate(CLIP) == "inset(0px 0px 0px 52%)"
    page.keyboard.press("Home")
    assert slider.evaluate(CLIP) == "inset(0px 0px 0px 0%)"
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert 70 < int(slider.input_value()) < 90


def test_tab_visits_every_control_with_a_visible_focus(visit: Any, report: str) -> None:
    page = visit(report)
    reached: set[str] = set()
    for _ in range(page.locator("a, summary, input, .scroll").count()):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.localName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == {"a", "div", "summary", "input"}


def test_the_details_open_by_keyboard(visit: Any, report: str) -> None:
    page = visit(report)
    summary = page.get_by_text("Loss curves").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.locator("svg").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_every_width_and_shows_every_picture(
    visit: Any, report: str, screenshots: Path, width: int, scheme: str
) -> None:
    page = visit(report, width, scheme)
    for summary in page.locator("summary").all():
        summary.click()
    page.screenshot(path=screenshots / f"report-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate(SMALL_TARGETS) == 0
