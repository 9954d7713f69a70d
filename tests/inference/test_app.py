"""The local page, without a browser."""

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.errors import UserError
from starseg.inference import app
from starseg.inference.files import predict_files
from starseg.inference.predictor import load

CLASSES = ["cat", "dog", "cow"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Noise in blocks, 96x64 pixels, upright only by its EXIF data."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "upload").mkdir()
    path = tmp_path / "upload" / "photo.jpg"
    Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(path, exif=exif)
    return path


def test_the_mask_is_the_one_that_predict_writes(random_run: Path, photo: Path, tmp_path: Path) -> None:
    seen = app.view(app.open_side(random_run), photo, 1, CLASSES)
    (tmp_path / "out").mkdir()
    predict_files(load(random_run / "step_1"), [str(photo)], tmp_path / "out", Console(quiet=True))
    assert seen.mask.name == "photo.png"
    assert seen.mask.read_bytes() == (tmp_path / "out/photo.png").read_bytes()
    assert Image.open(seen.mask).size == (96, 64)
    assert sum(seen.percent.values()) == pytest.approx(100)


def test_a_missing_step_is_replaced_by_the_nearest_with_its_own_classes(random_run: Path, photo: Path) -> None:
    whole, first = app.open_side(random_run), app.open_side(random_run / "step_0")
    assert list(app.view(whole, photo, 1, CLASSES).percent) == ["background", *CLASSES]
    early, clipped = (app.view(side, photo, number, CLASSES) for side, number in ((whole, 0), (first, 1)))
    assert list(early.percent) == ["background", "cat", "dog"]
    assert early.percent == clipped.percent
    assert (early.caption, clipped.caption[-16:]) == (f"{whole.label}, step 0: cat, dog", "step 0: cat, dog")


def test_only_chosen_classes_are_tinted(random_run: Path, photo: Path) -> None:
    side = app.open_side(random_run)
    plain = np.asarray(app.view(side, photo, 1, []).overlay)
    assert (plain == app.segment(photo, random_run / "step_1")[0].image.permute(1, 2, 0).numpy()).all()
    assert not np.array_equal(np.asarray(app.view(side, photo, 1, CLASSES).overlay)[:64], plain)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    random_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large.png"
    Image.new("1", (8000, 5001)).save(large)
    monkeypatch.setattr(app, "load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="8000x5001 pixels are more than 40 megapixels; make it smaller"):
        app.view(app.open_side(random_run), large, 1, CLASSES)


def test_a_folder_that_is_not_a_run_is_refused_with_a_list_of_its_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished step in this run directory$"):
        app.serve([tmp_path], 0, Console(quiet=True))
    (tmp_path / "star").mkdir()
    (tmp_path / "star" / "results.json").touch()
    with pytest.raises(UserError, match=f"the runs in {tmp_path} are star"):
        app.serve([tmp_path], 0, Console(quiet=True))


def test_the_page_listens_on_loopback_only_and_names_a_taken_port() -> None:
    with app.listen(0) as here:
        address, port = here.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port {port}: cannot be used on 127.0.0.1 .*give another one"):
            app.listen(port)
    assert here.family == socket.AF_INET


def test_without_gradio_the_message_says_what_to_install(random_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"missing; pip install 'starseg\[app\]'"):
        app.serve([random_run], 0, Console(quiet=True))


@pytest.fixture(scope="module")
def client() -> Any:
    pytest.importorskip("gradio", reason="needs gradio; pip install 'starseg[app]'")
    from fastapi.testclient import TestClient

    return TestClient


def _components(page: Any, kind: str) -> list[dict[str, Any]]:
    return [part["props"] for part in page.config["components"] if part["type"] == kind]


def test_the_slider_needs_several_steps_and_limits_are_stated(random_run: Path, client: Any) -> None:
    pages = [app.build_page([app.open_side(path)]) for path in (random_run, random_run / "step_0")]
    assert [len(_components(page, "slider")) for page in pages] == [1, 0]
    assert [[c[0] for c in _components(p, "checkboxgroup")[0]["choices"]] for p in pages] == [CLASSES, CLASSES[:2]]
    assert "At most 50 MB and 40 megapixels" in _components(pages[0], "markdown")[0]["value"]


def test_the_page_loads_nothing_from_other_machines(
    random_run: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    made = client(app.make_app([app.open_side(random_run)]), base_url="http://127.0.0.1")
    page = made.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self' ")
    assert "fonts.googleapis.com" not in page.text + made.get("/theme.css").text
    assert made.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    assert [made.get(path).status_code for path in ("/docs", "/gradio_api/runs")] == [404, 404]
    too_long = {"files": ("long.jpg", b"0" * (app.MEGABYTES * 10**6 + 1))}
    assert made.post("/gradio_api/upload", files=too_long).status_code == 413
