"""The commands of STAR's journal version: flags, files and compute_prototype.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import starseg
from starseg.compat import commands
from starseg.engine.checkpoint import load_info
from starseg.models import Architecture
from starseg.utils.files import read_json

ROOT = Path(__file__).parents[2]
Train = Callable[..., None]
LITE = ("--noise_type", "dist", "--basemodel", "DeepLabV3")
BASIC = (*LITE, "--save_prototypes")


def _folder(tmp_path: Path, step: int, name: str = "STAR") -> Path:
    return tmp_path / "saved" / "models" / f"overlap_5-3_{name}" / f"step_{step}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in torch.load(path, weights_only=True).items()}


def _derive(published: Path, step: int, *argv: str) -> None:
    commands.derive(["-c", str(published), "-d", "cpu", "--task_step", str(step), *argv])


def test_star_basic(train: Train, tmp_path: Path) -> None:
    train(0, *BASIC, "--ep", "1")
    train(1, *BASIC, "--ep", "1")
    for step, classes in ((0, 5), (1, 8)):
        folder = _folder(tmp_path, step)
        assert load_info(folder).method == "star-basic"
        assert not (folder / "prototypes-epoch1.pth").exists()
        assert _shapes(folder / "saved_info-epoch1.pth") == {
            "numbers": (1 + classes,),
            "prototypes": (classes, 256),
            "dist_noise": (classes,),
        }


def test_star_lite_with_compute_prototype(train: Train, tmp_path: Path, published: Path) -> None:
    train(0, *LITE, "--ep", "1")
    _derive(published, 1, *LITE, "--ep", "1")
    before = _folder(tmp_path, 0)
    assert _shapes(before / "saved_info-epoch1.pth") == {"numbers": (6,)}
    assert _shapes(before / "new_saved_info-epoch1.pth") == {
        "numbers": (6,),
        "prototypes": (5, 256),
        "dist_noise": (5,),
    }
    derived = torch.load(before / "new_saved_info-epoch1.pth", weights_only=True)
    torch.testing.assert_close(derived["prototypes"].norm(dim=1), torch.ones(5))
    train(1, *LITE, "--ep", "1")
    assert _shapes(_folder(tmp_path, 1) / "saved_info-epoch1.pth") == {"numbers": (9,)}


def test_step_0_of_star_is_one_of_star_lite(train: Train, tmp_path: Path) -> None:
    """The published script for ADE20K trains step 0 of STAR-Lite without its flags."""
    train(0, "--ep", "1")
    train(1, *LITE, "--ep", "1")
    assert [load_info(_folder(tmp_path, step)).method for step in (0, 1)] == ["star", "star-lite"]
    train(0, "--ep", "1")


@pytest.mark.parametrize("flags", [BASIC, LITE])
def test_a_step_continues_from_published_files(flags: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    for step in (0, 1):
        train(step, *flags, "--ep", "1")
    theirs = _folder(tmp_path, 0, "Theirs")
    theirs.mkdir(parents=True)
    for name in ("checkpoint-epoch1.pth", "saved_info-epoch1.pth", "config.json"):
        shutil.copy(_folder(tmp_path, 0) / name, theirs)
    train(1, *flags, "--ep", "1", "--name", "Theirs")
    ours = load_file(_folder(tmp_path, 1) / "bank.safetensors")
    imported = load_file(_folder(tmp_path, 1, "Theirs") / "bank.safetensors")
    assert ours.keys() == imported.keys() and all(torch.equal(ours[k], imported[k]) for k in ours)
    assert read_json(theirs / "metrics.json")["imported"] == "checkpoint-epoch1.pth"


def test_step_0_of_star_basic_without_a_kind_of_noise(train: Train, tmp_path: Path) -> None:
    """As in four of the published scripts, whose later steps give --noise_type; another seed is theirs too."""
    train(0, "--save_prototypes", "--ep", "1")
    train(1, *BASIC, "--ep", "1", "--seed", "826")
    assert [load_info(_folder(tmp_path, step)).method for step in (0, 1)] == 2 * ["star-basic"]


def test_training_begins_with_the_prototypes_of_compute_prototype(
    train: Train, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture
) -> None:
    train(0, *LITE, "--ep", "1")
    _derive(published, 1, *LITE, "--ep", "1")
    path = _folder(tmp_path, 0) / "new_saved_info-epoch1.pth"
    derived = torch.load(path, weights_only=True)
    weights = []
    for change in (None, "none", "turned"):
        if change == "none":
            path.unlink()
        elif change == "turned":
            torch.save(derived | {"prototypes": derived["prototypes"].flip(0)}, path)
        shutil.rmtree(_folder(tmp_path, 1), ignore_errors=True)
        capsys.readouterr()
        train(1, *LITE, "--ep", "1")
        assert (path.name in capsys.readouterr().out) == (change != "none")
        weights.append(load_file(_folder(tmp_path, 1) / "model.safetensors")["heads.1.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    shutil.rmtree(_folder(tmp_path, 1))
    torch.save(derived | {"prototypes": derived["prototypes"][:, :7]}, path)
    _refused(lambda: train(1, *LITE, "--ep", "1"), capsys, "expected prototypes of shape (5, 256)")
    torch.save({k: v for k, v in derived.items() if k != "dist_noise"}, path)
    _refused(lambda: train(1, *LITE, "--ep", "1"), capsys, "holds numbers, prototypes, dist_noise; here dist_noise is")


@pytest.mark.parametrize("flags", [(), ("--noise_type", "dist")])
def test_segformer(flags: tuple[str, ...], train: Train, tmp_path: Path, published: Path) -> None:
    """Both steps, the second from the published files of the first, and a prediction from such a file."""
    tree = json.loads(published.read_text())
    tree["arch"]["args"]["backbone"] = "mit_b0"
    published.write_text(json.dumps(tree))
    flags = (*flags, "--basemodel", "SegFormer", "--ep", "1")
    for step in (0, 1):
        train(step, *flags)
        for name in ("model.json", "model.safetensors", "bank.safetensors", "metrics.json"):
            (_folder(tmp_path, 0) / name).unlink(missing_ok=step == 1)
    weights = _folder(tmp_path, 1) / "checkpoint-epoch1.pth"
    assert torch.load(weights, weights_only=True)["arch"] == "SegFormer"
    assert load_info(_folder(tmp_path, 1)).architecture == Architecture("mit_b0", "segformer", 16)
    assert starseg.load(weights, "cpu").predict(np.zeros((50, 70, 3), np.uint8)).shape == (50, 70)


def test_segformer_asks_for_a_file_of_weights(train: Train, published: Path, capsys: pytest.CaptureFixture) -> None:
    tree = json.loads(published.read_text())
    tree["arch"]["args"] = {"backbone_pretrained": True}
    published.write_text(json.dumps(tree))
    _refused(lambda: train(0, "--basemodel", "SegFormer"), capsys, "timm has no weights of 'mit_b2'; give a file")


def _refused(run: Callable[[], None], capsys: pytest.CaptureFixture, message: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error, error


def test_what_is_refused(train: Train, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture) -> None:
    _refused(lambda: train(0, "--noise_type", "round"), capsys, "trainer.noise_type")
    _refused(lambda: train(0, "--basemodel", "UPerNet"), capsys, "arch.type")
    _refused(lambda: _derive(published, 0, *LITE), capsys, "step 0 has no old classes")
    _refused(lambda: _derive(published, 1, *BASIC), capsys, "leave --save_prototypes out")
    _refused(lambda: _derive(published, 1), capsys, "add --noise_type")
    _refused(lambda: _derive(published, 1, *LITE), capsys, "saved_info-epoch2.pth there")


def test_files_that_do_not_fit_are_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(0, *BASIC, "--ep", "1")
    theirs = _folder(tmp_path, 0, "Theirs")
    theirs.mkdir(parents=True)
    for name in ("checkpoint-epoch1.pth", "config.json"):
        shutil.copy(_folder(tmp_path, 0) / name, theirs)
    path = theirs / "saved_info-epoch1.pth"
    again = (*BASIC, "--ep", "1", "--name", "Theirs")
    torch.save({"numbers": torch.ones(6)}, path)
    _refused(lambda: train(1, *again), capsys, "here prototypes is missing")
    torch.save({"numbers": torch.ones(6), "prototypes": torch.ones(4, 256), "dist_noise": torch.ones(5)}, path)
    _refused(lambda: train(1, *again), capsys, "6 numbers do not belong with {'prototypes': (4, 256)}")


@pytest.mark.parametrize("flags", [BASIC, LITE])
def test_cityscapes(
    flags: tuple[str, ...], tmp_path: Path, write_city: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    """Two steps of 13-6 with the flags of the published scripts, and eval_city.py."""
    root = write_city(tmp_path / "CityScapes", train=12, val=4, ids=(8, 11, 26, 33))
    tree = json.loads((ROOT / "configs" / "config_city.json").read_text())
    args = tree["data_loader"]["args"]
    for split in ("train", "val", "test"):
        args[split]["args"]["transform_args"]["crop_size"] = 64
    args["task"]["allow_absent"] = True
    tree["arch"]["args"] |= {"backbone": "test_resnet", "backbone_pretrained": False}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree))
    common = [
        "-c",
        str(config),
        "-d",
        "cpu",
        "--multiprocessing_distributed",
        "--save_dir",
        str(tmp_path / "saved_city"),
    ]
    common += ["--name", "STAR", "--task_name", "13-6", "--task_setting", "overlap", "--bs", "4", "--ep", "1"]
    common += ["--data_root", str(root), *flags]
    commands.train("city", [*common, "--task_step", "0", "--lr", "0.005"])
    if flags == LITE:
        commands.derive([*common, "--task_step", "1"])
    commands.train("city", [*common, "--task_step", "1", "--lr", "0.0005", "--freeze_bn", "--mem_size", "0"])
    folder = tmp_path / "saved_city" / "models" / "overlap_13-6_STAR" / "step_1"
    assert len(load_info(folder).names) == 20
    capsys.readouterr()
    commands.evaluate("city", ["-d", "cpu", "--test", "-r", str(folder / "checkpoint-epoch1.pth")])
    assert "mean all" in capsys.readouterr().out
