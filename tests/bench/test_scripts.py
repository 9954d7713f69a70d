"""The scripts in benchmarks/ and examples/ use the current names of the package."""

import inspect
import json
import runpy
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from starseg.config import DataConfig
from starseg.data.datasets import open_dataset

ROOT = Path(__file__).parents[2]
# cityscapes.py registers a data set: tests/data/datasets/test_plugin.py imports it.
SCRIPTS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.stem not in ("cityscapes", "fidelity")], ids=lambda p: p.name)
def test_a_script_imports_no_former_name(path: Path) -> None:
    if path.stem == "onnx_predict":
        pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        runpy.run_path(str(path), run_name=path.stem)


def test_images_at_once_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "images_at_once.py"))["main"]
    monkeypatch.setitem(inspect.unwrap(main).__globals__, "CASES", (("test_resnet", 32, (2, 1)),))
    main()
    assert "test_resnet, 32 px, an image: " in capsys.readouterr().out


def test_compile_step_measures_what_a_cpu_can(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "compile_step.py"))["main"]
    rows = main.__globals__["ROWS"]
    monkeypatch.setitem(main.__globals__, "ROWS", [row for row in rows if row.mode in (None, "graph")])
    main(["--batch", "2", "--crop", "64", "--backbone", "test_resnet", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert shown.count("images/s") == 8 and "failed" not in shown and "graph" not in shown
    main(["--batch", "2", "--crop", "64", "--backbone", "test_resnet", "--seconds", "0"])
    assert capsys.readouterr().out.count("not measured") == 8


def test_a_packed_subset_is_a_data_set_of_limited_size(shapes: Path, tmp_path: Path) -> None:
    pack = runpy.run_path(str(ROOT / "benchmarks" / "pack_subset.py"))["pack"]
    pack.__globals__["weights"] = lambda: []
    whole = open_dataset(DataConfig(root=shapes))
    files = [path for split in (whole.train, whole.test) for path in (*split.images, *split.masks)]
    limit = sum(path.stat().st_size + 1024 for path in files) / 2e6 + 0.1
    with pytest.raises(SystemExit, match="give more"):
        pack(shapes, tmp_path / "none.tar", 0.1)
    assert "training and" in pack(shapes, tmp_path / "some.tar", limit)
    assert (tmp_path / "some.tar").stat().st_size <= 1e6 * limit
    subprocess.run(["tar", "-xf", tmp_path / "some.tar", "-C", tmp_path], check=True)
    some = open_dataset(DataConfig(root=tmp_path / "PascalVOC2012"))
    assert 0 < len(some.train.images) < len(whole.train.images) and 0 < len(some.test.images) < len(whole.test.images)
    assert some.train.images[-1].read_bytes() == (shapes / "JPEGImages" / some.train.images[-1].name).read_bytes()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [(), ("--quick", "folder")])
def test_the_script_for_a_gpu_stops_early(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without a GPU unless asked for a quick check, whose parts report that this interpreter does not exist."""
    script, python = ROOT / "benchmarks" / "gpu.sh", tmp_path / "no-python"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = ["bash", str(script), *(str(tmp_path / "out") if a == "folder" else a for a in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if arguments else 2), done.stdout
    assert ("failed: tests bench" if arguments else "use --quick") in done.stdout
    assert (tmp_path / "out" / "log.txt").is_file()


def test_the_growth_of_constellation_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "constellation_growth.py"))
    space = script["steps"].__globals__
    for name, value in (("SIZE", 64), ("BATCH", 4), ("EPOCHS", 1), ("IMAGES", 24)):
        monkeypatch.setitem(space, name, value)
    monkeypatch.setitem(space, "NETWORK", {"backbone": "test_resnet", "pretrained": False})
    script["one"]("constellation", *script["prepare"]("constellation", tmp_path, 24))
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"images", "seconds", "cpu", "memory"} and figures["images"] > 0


def test_the_bank_grows_linearly_with_the_classes() -> None:
    random_bank = runpy.run_path(str(ROOT / "benchmarks" / "constellation_growth.py"))["random_bank"]
    sizes = [sum(t.nbytes for t in random_bank(classes).state_dict().values()) for classes in (0, 10, 20)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 10 * (8 * (8 + 256 * (4 + 2 * 4)) + 4)
