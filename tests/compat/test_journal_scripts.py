"""The launch scripts of the journal version on miniature data sets: their text unchanged, two steps of each.

STARSEG_JOURNAL names a clone of the published repository; its own scripts are then run in the same way.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.engine.checkpoint import is_finished, load_info

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("STARSEG_JOURNAL") or "/nowhere")
SCRIPTS = {folder: sorted((folder / "scripts").rglob("*_STAR-*.sh")) for folder in (ROOT, PUBLISHED)}
FAST = ROOT / "scripts" / "voc" / "overlapped" / "train_voc_15-5_STAR-Basic.sh"
# One class of each image; both steps of every task have images of at least one of their classes.
VOC, ADE = (1, 6, 11, 16, 20), (1, 51, 101)
# A stand-in for Python that notes the commands of a script; the test runs them, those of the first two steps.
PYTHON = '#!/bin/sh\n[ "$1" = -c ] && exec {python} "$@"\necho "$@" >> calls\n'


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _images(root: Path, ids: tuple[int, ...], files: Callable[[str, int], tuple[str, str]]) -> Path:
    """Write 26 training and 2 test images of each class, with the file names of image and mask that ``files`` gives."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 26), ("val", 2)):
        for i in range(count * len(ids)):
            mask = np.zeros((64, 64))
            mask[16:48, 8:56] = ids[i % len(ids)]
            image, label = files(split, i)
            _write(root / image, mask[..., None] * [2, 1, 1] + rng.integers(0, 20, (64, 64, 3)))
            _write(root / label, mask)
    return root


def _voc(root: Path) -> Path:
    masks = {"train": "SegmentationClassAug", "val": "SegmentationClass"}
    _images(root, VOC, lambda split, i: (f"JPEGImages/{split}{i}.jpg", f"{masks[split]}/{split}{i}.png"))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, name in (("train", "train_aug"), ("val", "val")):
        stems = sorted(path.stem for path in (root / "JPEGImages").glob(f"{split}*"))
        (lists / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return root


def _ade(root: Path) -> Path:
    splits = {"train": "training", "val": "validation"}
    _images(root, ADE, lambda split, i: (f"images/{splits[split]}/{i}.jpg", f"annotations/{splits[split]}/{i}.png"))
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.01\t9\t3\tthing {i}" for i in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory, write_city: Callable[..., Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("miniatures")
    city = write_city(folder / "city", train=104, val=8, ids=(8, 11, 26, 33))
    return {"voc": _voc(folder / "voc"), "ade": _ade(folder / "ade"), "city": city}


def _checkout(place: Path, miniatures: dict[str, Path]) -> Path:
    """Copy the commands, the scripts and the configurations, with small networks, images and epochs."""
    for path in (*ROOT.glob("train_*.py"), ROOT / "compute_prototype.py"):
        shutil.copy(path, place)
    shutil.copytree(ROOT / "scripts", place / "scripts")
    (place / "configs").mkdir()
    for dataset, root in miniatures.items():
        tree = json.loads((ROOT / "configs" / f"config_{dataset}.json").read_text())
        args = tree["data_loader"]["args"]
        args |= {"root": str(root), "task": args["task"] | {"allow_absent": True}}
        for split in ("train", "val", "test"):
            args[split]["args"]["transform_args"]["crop_size"] = 64
        tree["arch"]["args"] |= {"backbone": "test_resnet", "backbone_pretrained": False}
        tree["trainer"]["epochs"] = 1
        (place / "configs" / f"config_{dataset}.json").write_text(json.dumps(tree))
    python = place / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return place


def _run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command, in processes of its own if it wants several."""
    if "0,1" in argv:
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=500)
        assert not done.returncode, done.stdout[-2000:] + done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")


@pytest.mark.parametrize(
    ("origin", "script"),
    [
        pytest.param(
            origin, script, id=str(script.relative_to(origin)), marks=() if script == FAST else pytest.mark.slow
        )
        for origin, scripts in SCRIPTS.items()
        for script in scripts
    ],
)
def test_a_script_trains_two_steps(
    origin: Path, script: Path, tmp_path: Path, miniatures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = _checkout(tmp_path, miniatures)
    copy = place / script.relative_to(origin)
    shutil.copy(script, copy)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    subprocess.run(["bash", str(copy)], check=True, timeout=60)
    for command in (place / "calls").read_text().splitlines():
        argv = command.split()
        if int(argv[argv.index("--task_step") + 1]) < 2:
            _run(argv, monkeypatch)
    (run,) = place.glob("saved_*/models/*")
    assert all(is_finished(run / f"step_{step}") for step in (0, 1))
    # The published script of STAR-Basic for 10-1 contains the commands of STAR-Lite.
    method = "star-basic" if "--save_prototypes" in (place / "calls").read_text() else "star-lite"
    assert load_info(run / "step_1").method == method and run.name.endswith(f"STAR-{method[5:].capitalize()}")
    assert (run / "step_1" / "saved_info-epoch1.pth").is_file()
    assert (run / "step_0" / "new_saved_info-epoch1.pth").is_file() == (method == "star-lite")


def test_there_are_13_protocols_of_two_methods() -> None:
    names = [path.relative_to(ROOT / "scripts").as_posix() for path in SCRIPTS[ROOT]]
    assert len(names) == 26 and len({name.rpartition("_")[0] for name in names}) == 13
