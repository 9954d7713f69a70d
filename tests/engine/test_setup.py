"""What is checked before a run starts, and who is named when it fails."""

from pathlib import Path

import pytest
from rich.console import Console

from starseg.config import load_config, parse_config
from starseg.engine.runner import Runner
from starseg.engine.setup import check_method, make_method, prepare, resolve_config
from starseg.errors import UserError

TASK = {"task": {"name": "15-1"}}
QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({**TASK, "trian": {}}, "trian: unknown key; did you mean 'train'"),
        ({**TASK, "method": "starr"}, "method: unknown method 'starr'; known: adapter, .*finetune, .*star"),
        (
            {**TASK, "method": "gentle", "gentle": {"kd": 2}},
            "method: unknown method 'gentle'.* named by STARSEG_METHODS",
        ),
        ({**TASK, "star": {"ocmf": 1}}, "star.ocmf: unknown key"),
        ({**TASK, "star": 5}, r"star: expected a section \(key: value\), got 5"),
        ({**TASK, "method": "finetune", "memory": {"size": 5}}, "memory.size: method finetune keeps no images"),
    ],
)
def test_what_a_method_does_not_support_is_refused(tree: dict, message: str) -> None:
    config = parse_config(tree)
    for refuse in (check_method, make_method, resolve_config, lambda c: prepare(c, QUIET)):
        with pytest.raises(UserError, match=message):
            refuse(config)


def test_the_file_and_its_overrides_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}\n")
    config = load_config(path, ["method=starr"])
    with pytest.raises(UserError, match=r"c\.yaml \(with method=starr\):\nmethod: unknown method"):
        prepare(config, QUIET)
    with pytest.raises(UserError, match=r"c\.yaml \(with method=starr\):\n"):
        check_method(config.model_copy(update={"seed": 3}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.dataset=cows", "data.dataset: unknown data set 'cows'"),
        ("data.dataset=folder", "no recipe for method star on data set 'folder'"),
        ("recipe=cows", "recipe: method star has no recipe for data set 'cows'"),
    ],
)
def test_the_file_is_named_where_the_data_set_or_recipe_is_unknown(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}\n")
    with pytest.raises(UserError, match=rf"c\.yaml \(with {change}\):\n{message}"):
        prepare(load_config(path, [change]), QUIET)


def test_a_prepared_run_is_resolved(tiny: dict) -> None:
    run = prepare(parse_config({**tiny, "train": {"batch_size": 4}}), QUIET)
    assert (run.config.train.base.epochs, run.config.train.later.epochs, run.config.memory.size) == (60, 60, 0)
    assert run.fabric.world_size == 1 and len(run.task) == 3 and run.method.name == "star"
    assert not run.config.run_dir.exists()


def test_constructing_a_runner_does_no_work_and_leaving_it_releases_the_lock(tiny: dict) -> None:
    config = parse_config(tiny)
    wrong = Runner(parse_config({**tiny, "data": {"root": "/nowhere"}}), QUIET)
    for _ in range(2):
        with Runner(config, QUIET) as runner:
            assert runner.prepared.fabric is runner.fabric
            with pytest.raises(UserError, match="another process"), Runner(config, QUIET):
                pass
        with pytest.raises(UserError, match="/nowhere"), wrong:
            pass


def test_the_lock_is_released_where_entering_fails(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, although a notebook, say, keeps the exception and with it the file."""

    def full(path: Path, data: bytes) -> None:
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("starseg.engine.rundir.write_atomic", full)
        with pytest.raises(UserError, match="the disk is full") as kept:
            Runner(parse_config(tiny), QUIET).__enter__()
    with Runner(parse_config(tiny), QUIET):
        assert kept.value
