"""Export: the ONNX file, its checks and metadata, the example, the model card."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import starseg
from starseg.cli.main import main
from starseg.data.images import read_image
from starseg.engine.evaluate import open_weights
from starseg.engine.metrics import summarize
from starseg.errors import UserError
from starseg.finetuning.prepare import open_source_step
from starseg.inference.hub import write_hub

QUIET = Console(quiet=True)
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"


@pytest.fixture
def onnxruntime() -> Any:
    pytest.importorskip("onnx", reason="needs onnx; pip install 'starseg[export]'")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime; pip install 'starseg[export]'")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(noise).resize((96, 64)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_onnx_of_any_size_agrees_with_predict(onnxruntime: Any, step_dir: Path, photos: Path, tmp_path: Path) -> None:
    from starseg.inference.onnx import export_onnx

    console = Console(record=True, width=200)
    agreement = export_onnx(step_dir, tmp_path / "deep" / "model.onnx", console, images=[str(photos)])
    assert agreement.masks >= 0.999 and agreement.logits < 1e-3 * max(1, agreement.largest)
    assert "masks agree on" in console.export_text()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "deep" / "model.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["background", "cat", "dog", "cow"]
    assert json.loads(about["dataset_ids"]) == [0, 8, 12, 10] and json.loads(about["mean"]) == [0.5, 0.5, 0.5]
    assert "largest logit" in about["rule"] and about["crop"] == "64"
    image = np.asarray(Image.open(photos / "0.png"))
    (mask,) = session.run(["mask"], {"images": image.transpose(2, 0, 1)[None]})
    assert len(np.unique(mask)) > 1
    assert (mask[0] == starseg.load(step_dir, "cpu").predict(image)).mean() > 0.999
    for shape in ((1, 3, 33, 47), (3, 3, 100, 64)):
        logits, mask = session.run(None, {"images": np.zeros(shape, np.uint8)})
        assert logits.shape == (shape[0], 3, *shape[2:]) and mask.shape == (shape[0], *shape[2:])


def test_a_file_that_disagrees_is_not_kept(
    onnxruntime: Any,
    step_dir: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from starseg.inference import onnx as export

    honest = export.write_onnx

    def wrong(predictor: starseg.inference.predictor.Predictor, path: Path) -> None:
        weight = predictor.model.heads[0].weight
        kept = weight.data.clone()
        weight.data *= 1.5
        honest(predictor, path)
        weight.data = kept

    monkeypatch.setattr(export, "write_onnx", wrong)
    with pytest.raises(UserError, match="disagrees with torch, so it was not kept"):
        export.export_onnx(step_dir, tmp_path / "out" / "model.onnx", QUIET, images=[str(photos)])
    assert not list((tmp_path / "out").iterdir())


def test_int8_reports_its_deviation(onnxruntime: Any, step_dir: Path, photos: Path, tmp_path: Path) -> None:
    from starseg.inference.onnx import export_onnx

    console = Console(record=True, width=200)
    export_onnx(step_dir, tmp_path / "float.onnx", QUIET, images=[str(photos)])
    agreement = export_onnx(step_dir, tmp_path / "int8.onnx", console, int8=True, images=[str(photos)])
    assert 0.5 < agreement.masks <= 1 and "int8: " in console.export_text()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (tmp_path / "float.onnx").stat().st_size
    with pytest.raises(UserError, match="--int8 is calibrated on images, found 0"):
        export_onnx(step_dir, tmp_path / "int8.onnx", QUIET, int8=True)


def test_the_example_runs_on_noise_checked_files(
    onnxruntime: Any,
    step_dir: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["starseg", "export", str(step_dir), "--out", str(tmp_path / "m.onnx")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and "checked on noise" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["onnx_predict.py", str(tmp_path / "m.onnx"), str(photos / "0.png")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    with Image.open(photos / "0_mask.png") as mask:
        expected = starseg.load(step_dir, "cpu").predict(photos / "0.png")
        assert (np.asarray(mask) == expected).mean() > 0.95
    drawn = photos / "1_mask.png"  # by hand, as ground truth is often named
    drawn.write_bytes(b"mine")
    monkeypatch.setattr(
        sys, "argv", ["onnx_predict.py", str(tmp_path / "m.onnx"), f"{photos}/2.png", f"{photos}/1.png"]
    )
    with pytest.raises(SystemExit, match=f"{drawn} is there already"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert drawn.read_bytes() == b"mine" and not (photos / "2_mask.png").exists()


def test_the_example_predicts_what_starseg_predicts(onnxruntime: Any, tmp_path: Path) -> None:
    read = runpy.run_path(str(EXAMPLE))["read"]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8), "RGBA")
    paletted = noise.convert("RGB").quantize(16)
    paletted.info["transparency"] = 3
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    for image in (noise, noise.convert("LA"), noise.convert("RGB"), paletted, deep, noise.convert("1")):
        image.save(tmp_path / "x.png")
        expected = read_image(tmp_path / "x.png").permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(read(str(tmp_path / "x.png"))), expected)


def test_the_example_continues_after_an_unreadable_file(
    onnxruntime: Any,
    step_dir: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from starseg.inference.onnx import export_onnx

    export_onnx(step_dir, step_dir / "m.onnx", QUIET)
    (photos / "text.png").write_text("no image")
    bad = [str(photos / "nowhere.png"), str(photos), str(photos / "text.png")]
    monkeypatch.setattr(sys, "argv", ["onnx_predict.py", str(step_dir / "m.onnx"), *bad, str(photos / "0.png")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and (photos / "0_mask.png").is_file() and len(lines) == 3
    assert all(f"{file}: cannot read this image (" in line for file, line in zip(bad, lines, strict=True))


def test_export_names_the_missing_package(step_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from starseg.inference.onnx import export_onnx

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'starseg\[export\]'"):
        export_onnx(step_dir, tmp_path / "m.onnx", QUIET)


def test_export_needs_a_target(step_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["starseg", "export", str(step_dir)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "--hub FOLDER" in capsys.readouterr().err


def test_options_of_onnx_need_its_file(
    step_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for option in (["--int8"], ["--images", str(photos)]):
        monkeypatch.setattr(sys, "argv", ["starseg", "export", str(step_dir), "--hub", str(tmp_path / "hub"), *option])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and "give --out model.onnx too" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_a_hub_folder_names_its_missing_files(step_dir: Path, tmp_path: Path) -> None:
    metrics = summarize(np.diag([5, 4, 3, 0]) + 1, ["background", "cat", "dog", "cow"], 2)
    (step_dir / "metrics.json").write_text(json.dumps({"step": 1, "new_classes": ["cow"], **metrics}))
    hub = write_hub(step_dir, tmp_path / "hub").parent
    for method in ("star", "finetune"):
        with pytest.raises(UserError, match=r"hub: an export .* holds no prototype bank .*step directory .*step_1"):
            open_source_step(hub, method)
    with pytest.raises(UserError, match=rf"hub: cannot be evaluated, {tmp_path}/config\.yaml is missing"):
        open_weights(hub, [])


def test_hub_folder_predicts_and_describes_itself(step_dir: Path, photos: Path, tmp_path: Path) -> None:
    metrics = summarize(np.diag([5, 4, 3, 0]) + 1, ["background", "cat", "dog", "cow"], 2)
    (step_dir / "metrics.json").write_text(json.dumps({"step": 1, "new_classes": ["cow"], **metrics}))
    steps = [{"step": t, "new_classes": ["x"], "miou": metrics["miou"]} for t in range(3)]
    (step_dir.parent / "results.json").write_text(json.dumps({"run": {}, "steps": steps}))
    card = write_hub(step_dir, tmp_path / "hub").read_text()
    assert card.startswith("---\nlibrary_name: starseg\n")
    assert f"| 10 | cow | {metrics['iou']['cow']:.1f} |" in card
    assert "\n| 1 | x |" in card and "\n| 2 | x |" not in card
    np.testing.assert_array_equal(
        starseg.load(tmp_path / "hub").predict(photos / "0.png"), starseg.load(step_dir).predict(photos / "0.png")
    )
    with pytest.raises(UserError, match="is the step itself"):
        write_hub(step_dir, step_dir)
    write_hub(step_dir, tmp_path / "hub")


def test_hub_export_overwrites_only_earlier_exports(
    random_run: Path, step_dir: Path, photos: Path, tmp_path: Path
) -> None:
    """A step holds a model.json too; neither it nor a folder with someone's own README is taken for an export."""
    metrics = summarize(np.diag([5, 4, 3, 0]) + 1, ["background", "cat", "dog", "cow"], 2)
    (step_dir / "metrics.json").write_text(json.dumps({"step": 1, "new_classes": ["cow"], **metrics}))
    card = write_hub(step_dir, tmp_path / "hub")
    other, unfinished, mine = (tmp_path / name for name in ("step_0", "unfinished", "mine"))
    shutil.copytree(random_run / "step_0", other)
    shutil.copy(card, other)  # a card beside it does not make a step an export
    shutil.copytree(random_run / "step_0", unfinished)
    (unfinished / "metrics.json").unlink()
    shutil.copytree(tmp_path / "hub", mine)
    (mine / "README.md").write_text("# My model\n")
    for folder in (other, unfinished, mine, photos):
        before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        with pytest.raises(UserError, match="did not make"):
            write_hub(step_dir, folder)
        assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
