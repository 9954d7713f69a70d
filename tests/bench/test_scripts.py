"""The scripts in benchmarks/ and examples/ use the current names of the package."""

import inspect
import runpy
import warnings
from pathlib import Path

import pytest

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
