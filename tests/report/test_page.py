"""The HTML report: its values, pictures and page; tests/browser opens it."""

import base64
import io
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from starseg.cli.main import main
from starseg.config import parse_config
from starseg.engine.runner import train
from starseg.errors import UserError
from starseg.report.cases import class_iou, mask_uri, photo_uri
from starseg.report.facts import confusion_groups, forgetting, gather, loss_curves, shown_names
from starseg.report.page import refuse_target, render_page, write_report
from starseg.report.svg import Line, line_chart

QUIET = Console(quiet=True)
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Collects tags with their attributes and checks that they close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def trained(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps. Not to be changed."""
    return train(parse_config(tiny_tree | {"out": str(tmp_path_factory.mktemp("trained") / "run")}), console=QUIET)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Its copy, to be changed at will."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_forgetting_is_the_best_earlier_iou_minus_the_last() -> None:
    steps = [
        {"step": 0, "iou": {"a": 50.0, "b": 30.0}},
        {"step": 1, "iou": {"a": 60.0, "b": None, "c": 9.0}},
        {"step": 2, "iou": {"a": 20.0, "b": 35.0, "c": 9.0, "d": 1.0}},
    ]
    found = {f.name: (f.learnt, f.first, f.best, f.final, f.lost) for f in forgetting(steps)}
    assert found == {"a": (0, 50, 60, 20, 40), "c": (1, 9, 9, 9, 0), "b": (0, 30, 30, 35, -5)}
    assert next(iter(found)) == "a" and forgetting(steps[:1]) == []


def test_confusion_between_groups() -> None:
    matrix = np.array([[80, 10, 0, 10], [5, 20, 15, 10], [0, 0, 50, 0], [2, 0, 6, 12]])
    result = confusion_groups(matrix, ["background", "a", "b", "c"], base=2, pairs=2)
    assert result.groups == [
        ("background", 100, [80, None, 10, 10]),
        ("old classes", 100, [70, 5, 15, 10]),
        ("new classes", 20, [60, 10, 30, 0]),
    ]
    assert result.pairs == [("a", "b", 30), ("c", "b", 30)]
    assert len(confusion_groups(matrix[:3, :3], ["background", "a", "b"], base=2).groups) == 2


def test_class_iou_leaves_ignored_pixels_out() -> None:
    truth = np.array([[[1, 1, 255, 0]], [[0, 0, 0, 0]]], np.uint8)
    predicted = np.array([[[1, 0, 1, 1]], [[0, 0, 0, 0]]], np.uint8)
    np.testing.assert_allclose(class_iou(predicted, truth, 1), [100 / 3, 0])


def test_pictures_are_small_and_the_background_shows_the_photo() -> None:
    mask = np.zeros((500, 400), np.uint8)
    mask[:250] = 8
    with Image.open(io.BytesIO(base64.b64decode(mask_uri(mask).split(",")[1]))) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        assert max(image.size) <= 224 and (alpha[-1] == 0).all() and 0 < alpha[0, 0] < 255
    assert len(photo_uri(torch.zeros(3, 500, 400, dtype=torch.uint8))) < 3000


def test_charts_are_well_formed_and_escaped() -> None:
    svg = line_chart([Line('<b>"', [(0, 1.0), (2, 50.0)], "s0"), Line("one", [(1, 0.0)], "muted")], "a & b", "x", "y")
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == "a & b"
    assert root.find(".//title").text == '<b>"'  # type: ignore[union-attr]
    places = [tuple(map(float, p.split(","))) for p in root.find(".//polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert places[0][0] < places[1][0] and places[0][1] > places[1][1]


def test_report_of_a_run(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report", QUIET)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["iou.png", "pictures.png", "report.html"]
    html = (tmp_path / "report" / "report.html").read_text()
    page = Page(html)
    assert not page.open
    assert (
        not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) and "url(http" not in html and "@import" not in html
    )
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    images = page.all("img")
    assert images and all(image["alt"] for image in images)
    assert len(page.all("caption")) == len(page.all("table"))
    sliders = page.all("input")
    assert sliders and all(s["type"] == "range" and s["aria-label"] for s in sliders)
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids)) and {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}
    assert "step_0" not in html and "Loss curves" in html and "times as much" in html
    final = json.loads((run / "results.json").read_text())["steps"][-1]["iou"]["disc"]
    assert f"{final:.1f}" in html


def test_loss_curves_come_from_the_logs(run: Path) -> None:
    curves = loss_curves(run / "step_1")
    assert {"loss", "mbce", "ocfm", "sad"} == set(curves) and all(curves.values())
    shutil.rmtree(run / "step_1" / "logs")
    assert loss_curves(run / "step_1") == {} and set(gather(run).losses) == {0, 2}


def test_a_page_without_the_data_set_says_so(run: Path, tmp_path: Path) -> None:
    config = run / "config.yaml"
    config.write_text(re.sub("root: .*", "root: /nowhere", config.read_text()))
    console = Console(record=True, width=300)
    write_report([run], tmp_path / "report", console)
    html = (tmp_path / "report" / "report.html").read_text()
    assert "Pictures are left out: /nowhere/" in html and "<input" not in html
    assert "pictures.png left out: /nowhere/" in console.export_text()
    shutil.rmtree(run / "step_2")
    assert "Confusion" in render_page([run])


def test_several_runs_and_names_are_escaped(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "<i>other"
    shutil.copytree(run, other)
    write_report([run, other], tmp_path / "both.html", QUIET)
    html = (tmp_path / "both.html").read_text()
    page = Page(html)
    assert "Comparison" in html and not page.all("i")[0].get("href") and "<i>other" not in html
    assert len([a for a in page.all("h2") if a.get("class") == "run"]) == 2
    with pytest.raises(UserError, match=r"results\.json: cannot read it"):
        write_report([tmp_path], tmp_path / "no.html", QUIET)


def test_runs_of_equal_name_are_distinguished_and_missing_steps_reported(run: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(run, tmp_path / place / "star")
    results = tmp_path / "b" / "star" / "results.json"
    content = json.loads(results.read_text())
    results.write_text(json.dumps(content | {"steps": content["steps"][:2]}))
    runs = [tmp_path / "a" / "star", tmp_path / "b" / "star"]
    assert shown_names(runs) == ["a/star", "b/star (2 of 3 steps)"]
    assert '<th scope="row">b/star (2 of 3 steps)</th>' in render_page(runs)
    results.unlink()
    with pytest.raises(UserError, match="no step of its own is finished yet"):
        shown_names(runs)


def test_a_report_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    photos, run, report, broken = (tmp_path / name for name in ("photos", "run.1", "report", "broken"))
    for folder, name in ((photos, "a.jpg"), (run, "results.json"), (report, "report.html"), (broken, "iou.png")):
        folder.mkdir()
        (folder / name).touch()
    (tmp_path / "text").touch()
    for free in (run, report, broken, tmp_path / "new", tmp_path / "new.html", tmp_path / "new" / "page.HTM"):
        refuse_target(free)
    with pytest.raises(UserError, match="photos: holds something, but no earlier report"):
        refuse_target(photos)
    for name in ("page.pdf", "text"):
        with pytest.raises(UserError, match=rf"{name}: expected a page that ends in \.html"):
            refuse_target(tmp_path / name)


def test_the_command_checks_its_target_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["starseg", "report", str(tmp_path), "--out", str(tmp_path / "page.pdf")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "ends in .html" in capsys.readouterr().err and not list(tmp_path.iterdir())
