"""`starseg app` in a browser."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="needs gradio; pip install 'starseg[app]'")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(path)
    return path


@pytest.fixture(scope="module")
def address(random_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a run beside its first step; in the end Ctrl-C stops the server without a word."""
    command = [sys.executable, "-m", "starseg", "app", random_run, "--compare", random_run / "step_0", "--port", "0"]
    log = tmp_path_factory.mktemp("server") / "stderr"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server:
        assert server.stdout
        yield server.stdout.readline().split()[0]
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=60)
    assert (server.returncode, rest, log.read_text()) == (0, "", "")


def _dropped(page: Any, file: Path) -> None:
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_text("Share of the image").wait_for()


def _picture(page: Any, before: str = "") -> str:
    """The address of the first picture, once it is another than ``before``."""
    page.wait_for_function("before => document.querySelector('.image-frame img')?.src != before", arg=before)
    return page.locator(".image-frame img").first.get_attribute("src")


def test_the_mask_is_the_one_that_predict_writes(
    visit: Any, address: str, photo: Path, random_run: Path, tmp_path: Path
) -> None:
    page = visit(address)
    _dropped(page, photo)
    for step, button in zip((1, 0), page.get_by_role("button", name="Mask").all(), strict=True):
        with page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == "photo.png"
        # In a process of its own, which chooses the same precision as the server.
        command = [sys.executable, "-m", "starseg", "predict", random_run / f"step_{step}", photo]
        subprocess.run([*command, "--out", tmp_path / str(step)], check=True, capture_output=True)
        assert download.value.path().read_bytes() == (tmp_path / str(step) / "photo.png").read_bytes()


def test_classes_and_steps_change_the_picture(visit: Any, address: str, photo: Path) -> None:
    page = visit(address)
    _dropped(page, photo)
    shown = _picture(page)
    page.get_by_label("dog", exact=True).uncheck()
    shown = _picture(page, shown)
    assert page.get_by_text("step 1: cow").is_visible()
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_text("run, step 0: cat, dog").wait_for()
    _picture(page, shown)
    assert page.locator("tr", has_text="cow").locator("td").all_inner_texts()[1:] == ["not learnt", "not learnt"]


def test_a_file_that_is_not_an_image_is_reported_on_the_page(
    visit: Any, address: str, photo: Path, tmp_path: Path
) -> None:
    page = visit(address)
    (tmp_path / "text.jpg").write_text("no image")
    page.locator("input[type=file]").set_input_files(tmp_path / "text.jpg")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("text.jpg: cannot read this image")
    assert page.get_by_role("button", name="Mask").first.is_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_every_width(
    visit: Any, address: str, photo: Path, screenshots: Path, width: int, scheme: str
) -> None:
    page = visit(address, width, scheme)
    _dropped(page, photo)
    _picture(page)
    page.screenshot(path=screenshots / f"app-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".shares").bounding_box()["width"] <= width
