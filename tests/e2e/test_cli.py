"""The command line as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from e2e.kill_at import Starter
from starseg.cli.main import main
from starseg.errors import UserError
from starseg.experiments import demo
from starseg.report.figures import write_figures
from starseg.utils.terminal import reporting_errors


def _starseg(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "starseg", *args], capture_output=True, text=True, timeout=300)


def test_train_eval_report(starter: Starter, tiny: dict, tmp_path: Path) -> None:
    """The first command in an interpreter of its own, as a user starts it; the others in forks, which start faster."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny))
    trained = _starseg("train", str(config), "--steps", "0-1")
    assert trained.returncode == 0, trained.stderr
    run = Path(tiny["out"])
    assert "step 1" in trained.stdout and str(run / "pictures.png") in trained.stdout
    again = starter.run("train", str(config), "--steps", "0-1")
    assert again.stdout.count("finished already") == 2
    scored = starter.run("eval", str(run / "step_1"), "--json", str(tmp_path / "e.json"))
    assert scored.returncode == 0 and "mean all" in scored.stdout and (tmp_path / "e.json").is_file()
    whole = starter.run("eval", str(run / "step_1"), "eval.image=full")
    assert whole.returncode == 0, whole.stderr
    other = starter.run("eval", str(run / "step_1"), "model.backbone=resnet18")
    assert other.returncode == 2 and "only data.*, eval.* and train.accelerator" in other.stderr
    drawn = starter.run("report", str(run), "--out", str(tmp_path / "report"))
    assert drawn.returncode == 0
    for name in ("iou.png", "pictures.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["train", "missing.yaml"],
            "missing.yaml: cannot read the configuration (No such file or directory); looked from /",
        ),
        (["train", "{config}", "data.root=/nowhere"], "/nowhere/ImageSets/Segmentation/train_aug.txt: cannot read"),
        (["train", "{config}", "--steps", "a-b"], "--steps: expected a step or a range"),
        (["train", "{config}", "train.accelerator=gpu"], "train.accelerator: gpu is asked for"),
        (["eval", "/nowhere/step_0"], "/nowhere/step_0: no step directory"),
        (
            ["eval", "/nowhere/step_0", "--json", "/nowhere/e.json"],
            "--json /nowhere/e.json: expected a file in a folder",
        ),
        (["data", "check", "{config}", "--json", "/"], "--json /: expected a file in a folder that exists"),
        (["data", "check", "{config}", "data.dataset=ade"], "objectInfo150.txt: cannot read this list"),
        (["report", "/nowhere"], "/nowhere/results.json: cannot read it"),
    ],
)
def test_a_mistake_gives_one_message(
    tiny: dict,
    tmp_path: Path,
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny))
    monkeypatch.setattr(sys, "argv", ["starseg", *(a.format(config=config) for a in args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path(tiny["out"]).exists()


def test_ctrl_c_says_how_to_resume(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny))
    monkeypatch.setattr("starseg.engine.fit.StepTraining.run", interrupted)
    monkeypatch.setattr(sys, "argv", ["starseg", "train", str(config)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert "rerun the same command to resume" in capsys.readouterr().err


def test_a_mistake_shows_no_traceback(starter: Starter) -> None:
    result = starter.run("train", "missing.yaml")
    assert result.returncode == 2 and "missing.yaml" in result.stderr and "Traceback" not in result.stderr


def test_the_demo_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo.demo_settings()
    settings["shapes"] |= {"train": 56, "val": 14, "size": 64}
    settings["data"]["crop"] = 64
    del settings["task"]["steps"][2:]
    tiny = {"batch_size": 4, "base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}}
    settings["train"] |= tiny | {"precision": "32"}
    monkeypatch.setattr(demo, "demo_settings", lambda: settings)
    console = Console(record=True, width=120)
    runs = demo.run_demo(tmp_path / "demo", console)
    text = console.export_text()
    assert list(runs) == [
        "star",
        "constellation",
        "finetune",
        "joint",
    ] and "kept: of the old mIoU after step 0" in " ".join(text.split())
    for path in ("star/pictures.png", "star/iou.png", "pictures.png", "iou.png"):
        assert (tmp_path / "demo" / path).stat().st_size > 10_000
    write_figures([runs["joint"]], tmp_path / "one", Console(quiet=True))


def test_the_demo_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds something that `starseg demo` did not make"):
        demo.run_demo(tmp_path, Console(quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")]
)
def test_out_of_memory_names_settings_that_need_less(error: Exception, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), reporting_errors(debug=False):
        raise error
    said = capsys.readouterr().err
    assert "out of memory" in said and "train.accumulate" in said and "Traceback" not in said
    with pytest.raises(SystemExit), reporting_errors(debug=False):
        torch.empty(2**60)
    assert "train.accumulate" in capsys.readouterr().err
    with pytest.raises(type(error)), reporting_errors(debug=True):
        raise error
