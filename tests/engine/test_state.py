"""The training state of an unfinished step: what is found, what is kept, and how the step restarts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from starseg.config import parse_config
from starseg.engine.state import (
    CURRENT,
    PREVIOUS,
    TrainingState,
    begun,
    clear,
    encode,
    read_state,
    set_aside,
    write_state,
)
from starseg.errors import Stopped, UserError
from starseg.experiments.train import train


def _state(iteration: int) -> TrainingState:
    draws = torch.get_rng_state()
    return TrainingState(iteration, {"w": torch.ones(3)}, {}, {}, {}, draws, [{"torch": draws}], images="abc")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace(path: Path) -> None:
    path.write_bytes(b"my notes\n")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [_truncate, _flip, _replace, _empty]


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_state(tmp_path, _state(3))
    write_state(tmp_path, _state(6))
    found = read_state(tmp_path)
    assert found.state and found.state.iteration == 6 and found.state.images == "abc" and not found.damaged
    assert torch.equal(found.state.model["w"], torch.ones(3))
    (tmp_path / CURRENT).unlink()  # as after a kill between the two renames of a save
    found = read_state(tmp_path)
    assert found.state and found.state.iteration == 3 and not found.damaged
    clear(tmp_path)
    assert not begun(tmp_path) and read_state(tmp_path).state is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_passed_over_and_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_state(tmp_path, _state(3))
    write_state(tmp_path, _state(6))
    damage(tmp_path / CURRENT)
    found = read_state(tmp_path)
    assert found.state and found.state.iteration == 3 and list(found.damaged) == [tmp_path / CURRENT]
    damage(tmp_path / PREVIOUS)
    found = read_state(tmp_path)
    assert found.state is None and list(found.damaged) == [tmp_path / CURRENT, tmp_path / PREVIOUS]


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / CURRENT).write_text(str(number))
        set_aside(tmp_path / CURRENT)
        assert begun(tmp_path), "another configuration must not take the directory over"
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {f"{CURRENT}.damaged": "0", f"{CURRENT}.damaged.2": "1", f"{CURRENT}.damaged.3": "2"}


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    data = encode(_state(3))
    (tmp_path / CURRENT).write_bytes(data.replace(b"resume-1", b"resume-9", 1))
    with pytest.raises(UserError, match=r"resume\.ckpt: a training state in format 9; this starseg reads format 1"):
        read_state(tmp_path)


def test_a_dictionary_without_later_fields_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first states were written."""
    first = {k: v for k, v in vars(_state(3)).items() if k not in ("time", "images")}
    real = torch.save
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", lambda content, file: real(first, file))
        (tmp_path / CURRENT).write_bytes(encode(_state(3)))
    state = read_state(tmp_path).state
    assert state and (state.iteration, state.time, state.images) == (3, {}, None)


@pytest.fixture(scope="module")
def settings(tiny_tree: dict) -> dict:
    """Settings of a step 0 of three epochs."""
    return {**tiny_tree, "train": {**tiny_tree["train"], "precision": "32", "base": {"epochs": 3, "lr": 0.01}}}


@pytest.fixture(scope="module")
def whole(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after step 0 without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    _resume({**settings, "out": str(out)})
    return _weights(out)


@pytest.fixture(scope="module")
def interrupted(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose step 0 was interrupted after its second save."""
    out, saves = tmp_path_factory.mktemp("interrupted") / "run", []

    def save(folder: Path, state: TrainingState) -> None:
        write_state(folder, state)
        saves.append(state.iteration)
        if len(saves) == 2:
            raise Stopped(15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("starseg.engine.step.write_state", save)
        with pytest.raises(Stopped):
            _resume({**settings, "out": str(out)})
    return out


@pytest.fixture
def broken(settings: dict, interrupted: Path, tmp_path: Path) -> dict:
    """Settings of a copy of :func:`interrupted`."""
    return {**settings, "out": str(shutil.copytree(interrupted, tmp_path / "run"))}


def _resume(settings: dict) -> str:
    console = Console(record=True, width=10_000)
    train(parse_config(settings), range(1), console)
    return console.export_text()


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "step_0" / "model.safetensors")


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("damage", [_truncate, _replace])
def test_the_previous_state_is_resumed_where_the_current_one_is_damaged(
    broken: dict, whole: dict[str, torch.Tensor], damage: Callable[[Path], None]
) -> None:
    folder = Path(broken["out"]) / "step_0"
    damage(folder / CURRENT)
    text = _resume(broken)
    assert f"{folder / CURRENT}: " in text and "it is kept as resume.ckpt.damaged" in text
    assert "step 0: resuming at iteration" in text and "restarting" not in text
    assert _same(_weights(Path(broken["out"])), whole)
    assert not list(folder.glob("resume*")), "a published step needs none"


@pytest.mark.parametrize(
    ("which", "damage"), [("both", _truncate), ("both", _replace), ("only one", _flip), ("only one", _empty)]
)
def test_without_an_intact_state_the_step_says_so_and_restarts_keeping_everything(
    broken: dict,
    whole: dict[str, torch.Tensor],
    damage: Callable[[Path], None],
    which: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(broken["out"]) / "step_0"
    logs = {path.name: path.read_bytes() for path in (folder / "logs").iterdir()}
    if which == "only one":
        (folder / PREVIOUS).unlink()
    files = {path.name: path for path in folder.glob("resume*")}
    for path in files.values():
        damage(path)
    damaged = {f"{name}.damaged": path.read_bytes() for name, path in files.items()}

    def stopped(*_: object) -> None:
        raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr("starseg.engine.fit.StepTraining.run", stopped)
        with pytest.raises(Stopped):
            _resume(broken)
    assert {path.name: path.read_bytes() for path in folder.glob("resume*")} == damaged
    assert logs and {path.name: path.read_bytes() for path in (folder / "logs.damaged").iterdir()} == logs
    for path in folder.glob("resume*.damaged"):
        path.rename(path.with_suffix(""))
    text = _resume(broken)
    assert "step 0: no intact training state; restarting step 0 from its beginning" in text
    assert "the state before" not in text and "resuming" not in text
    assert _same(_weights(Path(broken["out"])), whole)
