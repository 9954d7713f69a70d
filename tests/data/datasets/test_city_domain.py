"""Cityscapes with a domain for each city, and the setting "domain": tasks, division of the images, steps, refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import DATASETS, open_dataset
from starseg.engine.checkpoint import load_info, load_model
from starseg.engine.evaluate import evaluate_model
from starseg.errors import UserError
from starseg.methods import METHODS
from starseg.report.data_check import check_data
from starseg.report.page import write_report
from starseg.utils.files import read_json

Write = Callable[..., Path]
QUIET = Console(quiet=True)
ABLE = ["finetune", "ilt", "joint", "lwf", "mib", "plop"]


@pytest.fixture
def root(tmp_path: Path, write_city: Write) -> Path:
    """Aachen and Ulm, with 10 training and 4 validation images together, of road, building, car or bicycle."""
    return write_city(tmp_path / "CityScapes", train=20, val=4)


def _tree(root: Path, method: str = "finetune", **task: object) -> dict:
    return {
        "method": method,
        "out": str(root.parent / method),
        "data": {"dataset": "city_domain", "root": str(root), "crop": 64},
        "task": {"name": "tiny", "setting": "domain", "steps": [["aachen"], ["ulm"]], **task},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            **{"batch_size": 4, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 0.001}, "later": {"epochs": 1, "lr": 0.001}},
        },
    }


def test_the_tasks_of_plop() -> None:
    tasks = DATASETS["city_domain"].domain_tasks
    assert {name: [len(step) for step in steps] for name, steps in tasks.items()} == {
        "joint": [21],
        "11-5": [11, 5, 5],
        "11-1": [11, *[1] * 10],
        "1-1": [1] * 21,
    }
    assert tasks["11-5"][1] == ("dusseldorf", "hamburg", "jena", "monchengladbach", "stuttgart")
    assert tasks["1-1"][0] == ("aachen",) and tasks["11-1"][-1] == ("munster",)
    assert all(sum(steps, ()) == tasks["joint"][0] for steps in tasks.values())


def test_a_fifth_of_each_city_is_for_tests(root: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="city_domain", root=root))
    assert not dataset.background and dataset.names[1] == "road" and len(dataset.names) == 20
    assert not set(dataset.train.images) & set(dataset.test.images)
    for city in ("aachen", "ulm"):
        assert (dataset.train.domains.count(city), dataset.test.domains.count(city)) == (9, 3)
    assert all(
        image.parent.name == city
        for s in dataset.splits.values()
        for image, city in zip(s.images, s.domains, strict=True)
    )
    assert open_dataset(DataConfig(dataset="city_domain", root=root)) == dataset


def test_steps_have_the_images_of_their_domains(root: Path) -> None:
    report = check_data(parse_config(_tree(root)), QUIET)
    assert not report.broken and not report.task_problem
    data = report.data
    assert [len(data.positions(step, "train")) for step in (0, 1)] == [9, 9]
    assert [len(data.positions(step, "test")) for step in (0, 1)] == [3, 6]
    table = data.task.relabelling(1, "train")
    np.testing.assert_array_equal(table[1:20], np.arange(1, 20))


@pytest.mark.parametrize(
    "method", [m if m in ("finetune", "plop") else pytest.param(m, marks=pytest.mark.slow) for m in ABLE]
)
def test_two_steps(method: str, root: Path) -> None:
    run = starseg.train(parse_config(_tree(root, method)), console=QUIET)
    steps = read_json(run / "results.json")["steps"]
    if method == "joint":
        assert len(steps) == 1 and steps[0]["new_domains"] == ["aachen", "ulm"] and steps[0]["images"] == 18
        return
    assert [step["new_domains"] for step in steps] == [["aachen"], ["ulm"]]
    assert [len(step["new_classes"]) for step in steps] == [19, 0]
    info = load_info(run / "step_1")
    assert (
        info.head_sizes == [19]
        and info.domains == [["aachen"], ["ulm"]]
        and load_info(run / "step_0").domains == [["aachen"]]
    )
    assert list(steps[0]["iou"]) == list(steps[1]["iou"]) and len(steps[1]["iou"]) == 19
    assert steps[0]["miou"]["new"] is None and None not in steps[1]["miou"].values()
    model, info = load_model(run / "step_1")
    again = evaluate_model(model, info, parse_config(_tree(root, method)), QUIET)
    assert (
        again["miou"] == steps[1]["miou"]
        and again["confusion"] == read_json(run / "step_1" / "metrics.json")["confusion"]
    )
    if method == "finetune":
        write_report([run], run / "report.html", QUIET)
        assert "finetune" in (run / "report.html").read_text()


def test_every_other_method_is_refused(root: Path) -> None:
    assert sorted(name for name, method in METHODS.items() if method.domains) == ABLE
    for method in sorted(METHODS.keys() - ABLE):
        message = f"task.setting: method {method} learns new classes, not new domains .*: {', '.join(ABLE)}"
        with pytest.raises(UserError, match=message):
            starseg.train(parse_config(_tree(root, method)), console=QUIET)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"setting": "overlap"}, "has no setting 'overlap'; give one of: domain"),
        ({"steps": [["aachen"], ["rome"]]}, "step 1: no training image is of domain rome; .*: aachen, ulm"),
        ({"steps": [["aachen"], ["aachen"]]}, "domains listed twice: aachen"),
        ({"steps": [["aachen"], []]}, "every step needs at least one domain"),
        ({"steps": None, "name": "5-5"}, "unknown task '5-5'; .* in the setting domain, are: 1-1, 11-1, 11-5, joint"),
    ],
)
def test_wrong_tasks(task: dict, message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        starseg.train(parse_config(_tree(root, **task)), console=QUIET)


def test_other_data_sets_have_no_domains(shapes: Path, tiny: dict) -> None:
    tiny["method"], tiny["task"]["setting"] = "finetune", "domain"
    with pytest.raises(UserError, match="has no setting 'domain'; give one of: overlap, disjoint"):
        starseg.train(parse_config(tiny), console=QUIET)
