"""The published commands end to end: their files, and what is read back from them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import starseg
from starseg.cli.main import main
from starseg.compat import commands
from starseg.engine.state import TrainingState, write_state
from starseg.errors import Stopped
from starseg.utils.files import read_json

ROOT = Path(__file__).parents[2]
Train = Callable[..., None]


def _folder(tmp_path: Path, step: int, name: str = "STAR") -> Path:
    return tmp_path / "saved" / "models" / f"overlap_5-3_{name}" / f"step_{step}"


def test_steps_their_files_and_their_evaluation(
    train: Train, tmp_path: Path, twenty_classes: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0)
    train(1, "--mem_size", "4")
    folder = _folder(tmp_path, 1)
    for name in ("checkpoint-epoch2.pth", "prototypes-epoch2.pth", "config.json", "memory.json", "model.safetensors"):
        assert (folder / name).is_file(), name
    saved = torch.load(folder / "checkpoint-epoch2.pth", weights_only=True)
    assert saved["epoch"] == 2 and saved["arch"] == "DeepLabV3"
    heads = [(k, *v.shape) for k, v in saved["state_dict"].items() if k.startswith("cls.")]
    assert heads == [
        ("cls.0.weight", 5, 256, 1, 1),
        ("cls.0.bias", 5),
        ("cls.1.weight", 3, 256, 1, 1),
        ("cls.1.bias", 3),
    ]
    prototypes = torch.load(folder / "prototypes-epoch2.pth", weights_only=True)
    shapes = {k: tuple(v.shape) for k, v in prototypes.items()}
    assert shapes == {"numbers": (9,), "prototypes": (8, 256), "norm_mean_and_std": (2, 8), "noise": (8, 256)}
    kept = json.loads((folder / "config.json").read_text())
    assert kept["optimizer"]["args"]["lr"] == 1e-4 and kept["data_loader"]["args"]["memory"]["mem_size"] == 4
    assert len(json.loads((folder / "memory.json").read_text())["step_1"]["memory_list"]) == 4

    capsys.readouterr()
    log = tmp_path / "log"
    weights = str(folder / "checkpoint-epoch2.pth")
    commands.evaluate("voc", ["--device", "cpu", "--test", "--resume", weights, "--save_dir", str(log)])
    assert "mean all" in capsys.readouterr().out
    [figures] = log.glob("log/overlap_5-3_STAR/test_*/metrics.json")
    trained = read_json(folder / "metrics.json")
    assert {k: trained[k] for k in ("iou", "miou", "confusion")} == {
        k: read_json(figures)[k] for k in ("iou", "miou", "confusion")
    }
    monkeypatch.setattr(sys, "argv", ["starseg", "eval", weights, "--json", str(tmp_path / "native.json")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert read_json(tmp_path / "native.json")["iou"] == trained["iou"]
    image = next(twenty_classes.glob("JPEGImages/val_*.jpg"))
    masks = [starseg.load(path, "cpu").predict(image) for path in (weights, folder)]
    assert np.array_equal(*masks)


def test_a_step_continues_from_published_files_as_from_our_own(train: Train, tmp_path: Path) -> None:
    train(0)
    train(1)
    theirs = _folder(tmp_path, 0, "Theirs")
    theirs.mkdir(parents=True)
    for name in ("checkpoint-epoch2.pth", "prototypes-epoch2.pth", "config.json"):
        shutil.copy(_folder(tmp_path, 0) / name, theirs)
    train(1, "--name", "Theirs")
    for name in ("model", "bank"):
        ours = load_file(_folder(tmp_path, 1) / f"{name}.safetensors")
        imported = load_file(_folder(tmp_path, 1, "Theirs") / f"{name}.safetensors")
        assert ours.keys() == imported.keys() and all(torch.equal(ours[k], imported[k]) for k in ours)
    a, b = (read_json(_folder(tmp_path, 1, name) / "metrics.json") for name in ("STAR", "Theirs"))
    assert a["confusion"] == b["confusion"]
    assert read_json(theirs / "metrics.json")["imported"] == "checkpoint-epoch2.pth"


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def _refused(run: Callable[[], None], capsys: pytest.CaptureFixture, *messages: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and all(m in error for m in messages), error


def test_a_finished_step_keeps_its_options(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    short = ("--ep", "1", "--lr", "0.001")
    train(0, *short)
    first, run = _files(_folder(tmp_path, 0)), (tmp_path / "saved/models/overlap_5-3_STAR/config.yaml").read_bytes()
    _refused(lambda: train(0, "--ep", "2", "--lr", "0.001"), capsys, "train.base.epochs: 1 there, 2 now", "--name")
    both = ("train.base.lr: 0.001 there, 0.5 now", "star.mbce: 1.0 there, 3.0 now")
    _refused(lambda: train(0, "--ep", "1", "--lr", "0.5", "--mbce", "3"), capsys, *both)
    assert _files(_folder(tmp_path, 0)) == first
    assert (tmp_path / "saved/models/overlap_5-3_STAR/config.yaml").read_bytes() == run
    advice = "Give another directory with --name or --save_dir, or"
    _refused(lambda: train(0, *short, "--bs", "5"), capsys, "train.batch_size: 4 there, 5 now", advice)
    train(1, "--ep", "1", "--mbce", "2")
    again = ("--ep", "1", "--mbce", "2", "--mem_size", "20")
    _refused(lambda: train(1, *again), capsys, "memory.size: 0 there, 20 now")
    train(0, *short)
    assert "finished already" in capsys.readouterr().out and _files(_folder(tmp_path, 0)) == first


def test_a_step_of_starseg_train_keeps_its_options(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It has no config.json: the run's configuration says what it was trained with."""
    train(0, "--ep", "1")
    folder = _folder(tmp_path, 0)
    for name in ("config.json", "checkpoint-epoch1.pth", "prototypes-epoch1.pth"):
        (folder / name).unlink()
    _refused(lambda: train(0, "--ep", "2"), capsys, "train.base.epochs: 1 there, 2 now")
    train(0, "--ep", "1")
    assert (folder / "checkpoint-epoch1.pth").is_file() and (folder / "config.json").is_file()


def test_an_interrupted_step_resumes_only_with_its_own_options(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0, "--ep", "1")

    def interrupted(folder: Path, state: TrainingState) -> None:
        write_state(folder, state)
        raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr("starseg.engine.step.write_state", interrupted)
        with pytest.raises(SystemExit):
            train(1)
    train(0, "--ep", "1")
    _refused(lambda: train(1, "--mbce", "9"), capsys, "star.mbce: 1.0 there, 9.0 now")
    _refused(lambda: train(1, "--lr", "0.1"), capsys, "train.later.lr: 0.0001 there, 0.1 now")
    train(1)
    assert "resuming at iteration" in capsys.readouterr().out


def test_published_image_lists_are_honoured(
    train: Train, twenty_classes: Path, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = (twenty_classes / "ImageSets/Segmentation/train_aug.txt").read_text().splitlines()
    lists = tmp_path / "data" / "voc"
    lists.mkdir(parents=True)
    np.save(lists / "overlap_5-3_train_00.npy", np.array(lines[:20]))
    tree = json.loads(published.read_text())
    tree["data_loader"]["args"]["task"]["idxs_path"] = str(tmp_path / "data")
    published.write_text(json.dumps(tree))
    train(0, "--ep", "1")
    assert "from 20 images" in capsys.readouterr().out
    np.save(lists / "overlap_5-3_train_00.npy", np.array(["/JPEGImages/nobody.jpg /x.png"]))
    with pytest.raises(SystemExit):
        train(0, "--ep", "1", "--name", "Other")
    assert "nobody.jpg" in capsys.readouterr().err
    np.save(lists / "overlap_5-3_train_00.npy", np.array([]))
    with pytest.raises(SystemExit):
        train(0, "--ep", "1", "--name", "Other")
    assert "step 0" in capsys.readouterr().err


def test_advice_names_keys_of_the_published_configuration(
    train: Train, published: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = json.loads(published.read_text())
    tree["data_loader"]["args"]["task"] = {"name": "15-5"}
    published.write_text(json.dumps(tree))
    advice = "train all the same with data_loader.args.task.allow_absent: true in the configuration"
    _refused(lambda: train(0), capsys, advice)


class _Trap:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemError('code in a checkpoint ran')",)


def test_files_that_are_not_checkpoints_are_refused(
    train: Train, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(run: Callable[[], None], *messages: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            run()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and all(m in error for m in messages), error
        assert "Traceback" not in error

    refused(lambda: train(1), "step 1 starts from step 0, which is not there", str(_folder(tmp_path, 0)))
    weights = tmp_path / "weights.pth"

    def evaluate() -> None:
        commands.evaluate("voc", ["-d", "cpu", "-r", str(weights), "-c", str(published)])

    torch.save({"state_dict": {"cls.0.weight": _Trap()}}, weights)
    refused(evaluate, str(weights), "not a published checkpoint")
    weights.write_bytes(pickle.dumps(_Trap()))
    refused(evaluate, "not a published checkpoint")
    weights.write_bytes(b"PK\x03\x04 cut off")
    refused(evaluate, "not a published checkpoint")
    torch.save([1], weights)
    refused(evaluate, "it holds a list")
    torch.save({"state_dict": {"cls.0.weight": torch.zeros(7, 256, 1, 1)}}, weights)
    refused(evaluate, "its heads hold [7] classes, task 5-3 of its configuration has [5]")
    torch.save({"state_dict": {"cls.0.weight": torch.zeros(5, 256, 1, 1)}}, weights)
    refused(evaluate, "does not fit test_resnet")
    folder = _folder(tmp_path, 0)
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "checkpoint-epoch2.pth")
    refused(lambda: train(1), "does not fit test_resnet")


def test_a_launch_script_runs_every_step(tmp_path: Path) -> None:
    """With a stand-in for Python that only notes its arguments, but for the number of steps."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@" >> {tmp_path}/calls\n')
    stand_in.chmod(0o755)
    script = ROOT / "scripts" / "ade" / "overlapped" / "train_ade_50-50.sh"
    subprocess.run([script], check=True, env=os.environ | {"PYTHON": str(stand_in), "MEMORY_SIZE": "50"}, timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    common = (
        "train_ade.py -c configs/config_ade.json -d 0,1 --multiprocessing_distributed --save_dir saved_ade --name STAR"
    )
    task = "--task_name 50-50 --task_setting overlap --bs 12"
    assert calls == [
        f"{common} {task} --task_step 0 --lr 0.0025",
        f"{common} {task} --task_step 1 --lr 0.00025 --freeze_bn --mem_size 50",
        f"{common} {task} --task_step 2 --lr 0.00025 --freeze_bn --mem_size 50",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: scripts/train.sh DATASET SETTING TASK [METHOD]"),
        (["voc", "overlap", "77-1"], "unknown task '77-1' for data set 'voc'; known: 1-1, 10-1, "),
        (["voc", "overlap", "15-1", "DKD"], "unknown method 'DKD'; known: STAR, STAR-Basic, STAR-Lite"),
        (["coco", "overlap", "15-1"], "unknown data set 'coco'; known: voc, ade, city"),
    ],
)
def test_a_launch_script_prints_its_usage(argv: list[str], message: str) -> None:
    command = [str(ROOT / "scripts" / "train.sh"), *argv]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "name",
    [*(f"{kind}_{dataset}" for kind in ("train", "eval") for dataset in ("voc", "ade", "city")), "compute_prototype"],
)
def test_the_scripts_at_the_root(name: str) -> None:
    command = [sys.executable, str(ROOT / f"{name}.py"), "-r", "/nowhere/weight.pth"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "there is no checkpoint /nowhere/weight.pth" in done.stderr
