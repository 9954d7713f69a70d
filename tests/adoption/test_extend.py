"""`starseg learn` extends an adopted network by classes, and its own predictions stay as they were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from adoption.originals import Original, images
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.data.images import read_mask
from starseg.engine.checkpoint import load_bank, load_info, load_model
from starseg.errors import UserError
from starseg.finetuning.run import LearnRequest, learn
from starseg.inference.onnx import export_onnx
from starseg.inference.predictor import load, step_rule
from starseg.models.extended import ExtendedSegmenter

QUIET = Console(quiet=True)
Make = Callable[[str], Original]


@pytest.fixture
def photos(shapes: Path, tmp_path: Path) -> Callable[[int], tuple[Path, Path]]:
    """Photos that show a class of the shapes data set, and masks that label it alone, as 1."""

    def make(class_id: int) -> tuple[Path, Path]:
        folder = tmp_path / f"class{class_id}"
        (folder / "photos").mkdir(parents=True)
        (folder / "masks").mkdir()
        for mask in sorted(shapes.glob("SegmentationClassAug/*.png")):
            if (ids := np.asarray(read_mask(mask)) == class_id).any():
                Image.fromarray(ids.astype(np.uint8)).save(folder / "masks" / mask.name)
                (folder / "photos" / f"{mask.stem}.jpg").symlink_to(shapes / "JPEGImages" / f"{mask.stem}.jpg")
        return folder / "photos", folder / "masks"

    return make


def _adopted(original: Original, out: Path, **options: object) -> Path:
    request = AdoptRequest(original.source, out, original.weights, original.classes, crop=64)
    return adopt(AdoptRequest(**{**request.__dict__, **options}), QUIET)


def _check_kept(before: Path, after: Path, pixels: Tensor, photos: Path) -> None:
    """Check the promise on logits, on their prediction, and on masks at the photos' own sizes."""
    (old, info), (new, grown) = load_model(before), load_model(after)
    with torch.inference_mode():
        logits, more = old.predict(pixels), new.predict(pixels)
    assert torch.equal(more[:, : logits.shape[1]], logits)
    ids, now = step_rule(info)(logits), step_rule(grown)(more)
    kept = now < len(info.names)
    assert torch.equal(now[kept], ids[kept])
    found = sorted(photos.iterdir())[:4]
    for one, other in zip(load(before).predict(found), load(after).predict(found), strict=True):
        same = np.isin(other, info.dataset_ids)
        assert (one[same] == other[same]).all() and same.any()


def _learn(step: Path, data: tuple[Path, Path], name: str, out: Path, **options: object) -> tuple[Path, str]:
    console = Console(record=True, width=160)
    learnt = learn(LearnRequest(step, *data, name, out, **options), console)
    assert learnt is not None
    return learnt, console.export_text()


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:lraspp_mobilenet_v3_large",
        pytest.param("smp:Unet", marks=pytest.mark.slow),
        pytest.param("smp:FPN", marks=pytest.mark.slow),
        pytest.param("transformers:Segformer", marks=pytest.mark.slow),
        pytest.param("transformers:Beit", marks=pytest.mark.slow),
        pytest.param("torchvision:deeplabv3_mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_old_predictions_stay_bit_for_bit(
    name: str, original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    step = _adopted(original(name), tmp_path / "run")
    pixels = images((64, 64), 4)
    hearts, stars = photos(5), photos(4)
    first, shown = _learn(step, hearts, "heart", tmp_path / "first")
    info = load_info(first)
    assert info.method == "constellation-extend" and info.head_sizes[-1] == 1
    assert "the predictions stay exactly as they were" in shown and "cells found in" in shown
    _check_kept(step, first, pixels, hearts[0])
    second, _ = _learn(first, stars, "star", tmp_path / "second")
    assert load_info(second).names[-2:] == ["heart", "star"]
    _check_kept(first, second, pixels, stars[0])
    _check_kept(step, second, pixels, stars[0])
    counts = load_bank(second)["counts"]
    assert len(counts) == len(load_info(second).names) and (counts[-2:] > 0).all()


def test_a_network_without_background_learns(
    original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    step = _adopted(
        original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run", classes="d,a,b,c", background=False
    )
    hearts = photos(5)
    with pytest.raises(UserError, match="has no background class, and mib takes everything but the new class"):
        learn(LearnRequest(step, *hearts, "heart", tmp_path / "out", "mib"), QUIET)
    learnt, _ = _learn(step, hearts, "heart", tmp_path / "out", method="constellation")
    model = load_model(learnt)[0]
    assert model.architecture.extension is not None and model.architecture.extension.within == [-1]
    _check_kept(step, learnt, images((64, 64), 4), hearts[0])
    masks = load(learnt).predict(sorted(hearts[0].iterdir()))
    assert 0 not in np.unique(np.concatenate([m.flatten() for m in masks]))


def test_unlabelled_photos_are_replayed_and_the_preview_says_what_is_known(
    original: Make, photos: Callable[[int], tuple[Path, Path]], shapes: Path, tmp_path: Path
) -> None:
    step, hearts = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), photos(5)
    given = str(shapes / "JPEGImages")
    learnt, shown = _learn(step, hearts, "heart", tmp_path / "out", photos=given)
    assert "in 60 unlabelled photos" in shown
    counts = load_bank(learnt)["counts"]
    assert (counts > 0).sum() >= 3
    console = Console(record=True, width=160)
    request = LearnRequest(learnt, *photos(4), "star", tmp_path / "more")
    learn(request, console, dry_run=True)
    assert "stored cells" in console.export_text()
    with pytest.raises(UserError, match="--photos: only constellation-extend has this option, not mib"):
        learn(LearnRequest(step, *hearts, "heart", tmp_path / "mib", "mib", photos=given), QUIET)


def test_part_of_a_class(original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path) -> None:
    step, hearts = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), photos(5)
    with pytest.raises(UserError, match=r"--part-of vehicle: .* knows no such class; expected one of a, b, c"):
        learn(LearnRequest(step, *hearts, "heart", tmp_path / "out", part_of="vehicle"), QUIET)
    learnt, shown = _learn(step, hearts, "heart", tmp_path / "out", part_of="B")
    assert "learns the part of b that is heart" in shown
    model = load_model(learnt)[0]
    assert isinstance(model, ExtendedSegmenter) and model.extension.within == [2]
    with torch.no_grad():
        output = model(model.normalize(images((64, 64))))
        described, own = output.features.split([model.extension.width, 4], 1)
        odds = model.heads[1](described, own[:, 2:3], own.amax(1, keepdim=True))
    torch.testing.assert_close(output.logits[:, 4:], output.logits[:, 2:3] + odds)
    _check_kept(step, learnt, images((64, 64), 4), hearts[0])


def test_a_copy_is_tuned_for_the_first_new_class(
    original: Make, photos: Callable[[int], tuple[Path, Path]], shapes: Path, tmp_path: Path
) -> None:
    step, hearts = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), photos(5)
    tuned = {"tune_copy": True, "epochs": 2, "photos": str(shapes / "JPEGImages")}
    first, shown = _learn(step, hearts, "heart", tmp_path / "first", **tuned)
    assert "schedule: 2 epochs of" in shown and "iterations of a copy" in shown
    _check_kept(step, first, images((64, 64), 4), hearts[0])
    second, _ = _learn(first, photos(4), "star", tmp_path / "second")
    _check_kept(first, second, images((64, 64), 4), hearts[0])
    export_onnx(second, tmp_path / "net.onnx", QUIET)
    with pytest.raises(UserError, match=r"--tune-copy: .* has been extended already"):
        learn(LearnRequest(first, *photos(3), "ring", tmp_path / "third", tune_copy=True), QUIET)


def test_refining_calibrates_the_old_logits(
    original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    step, hearts = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), photos(5)
    learnt, shown = _learn(step, hearts, "heart", tmp_path / "out", refine=True)
    assert "--refine: a factor and an offset for each logit" in shown
    old, new = load_model(step)[0], load_model(learnt)[0]
    assert isinstance(new, ExtendedSegmenter)
    scale, bias = new.calibration.scale, new.calibration.bias
    assert not torch.equal(scale, torch.ones_like(scale))
    with torch.no_grad():
        pixels = images((64, 64))
        before, after = (m.predict(pixels) for m in (old, new))
    assert torch.equal(after[:, :4], before * scale + bias)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:lraspp_mobilenet_v3_large",
        "smp:FPN",
        "transformers:Segformer",
    ],
)
def test_a_class_is_learnt_again_and_replaces_the_old_one(
    name: str, original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    step, hearts = _adopted(original(name), tmp_path / "run"), photos(5)
    (old, before), pixels = load_model(step), images((64, 64), 4)
    again, value = before.names[2], before.predicted_ids[2]
    learnt, shown = _learn(step, hearts, again.upper(), tmp_path / "out", replace=again)
    assert f"{again}: learnt again; it replaces the old {again}" in shown
    assert f"wherever neither {again} nor the old {again} is predicted, the predictions stay exactly as" in shown
    new, after = load_model(learnt)
    by_id = [dict(zip(info.dataset_ids, info.names, strict=True)) for info in (before, after)]
    assert by_id[0] == by_id[1] and after.dataset_ids == [0, 1, 3, 2] and after.head_sizes == [2, 1]
    assert before.predictable == after.predictable
    with torch.inference_mode():
        logits, more = old.predict(pixels), new.predict(pixels)
    assert torch.equal(more[:, :3], logits[:, [0, 1, 3]])
    found = sorted(hearts[0].iterdir())[:4]
    for one, other in zip(load(step).predict(found), load(learnt).predict(found), strict=True):
        kept = (one != value) & (other != value)
        assert (one[kept] == other[kept]).all() and kept.any()
    assert _learn(step, hearts, again.upper(), tmp_path / "out", replace=again)[0] == learnt


def test_a_network_whose_class_was_replaced_is_exported_and_learns_on(
    original: Make, photos: Callable[[int], tuple[Path, Path]], tmp_path: Path
) -> None:
    step, hearts = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), photos(5)
    learnt, _ = _learn(step, hearts, "b", tmp_path / "out", replace="b")
    export_onnx(learnt, tmp_path / "net.onnx", QUIET)
    second, _ = _learn(learnt, photos(4), "star", tmp_path / "second")
    info = load_info(second)
    assert info.names == ["background", "a", "c", "b", "star"] and info.dataset_ids == [0, 1, 3, 2, 4]
    _check_kept(learnt, second, images((64, 64), 4), hearts[0])
    for name, remedy in (("a", "replace it in the step before the first"), ("b", "step 1 learnt it: learn it again")):
        with pytest.raises(UserError, match=rf"--replace {name}: the network of .* has been extended, .*{remedy}"):
            learn(LearnRequest(learnt, *hearts, name, tmp_path / "third", replace=name), QUIET)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ("b", {}, "nothing to learn, .* knows all of b; name a new class, or give --replace b to learn it again"),
        ("heart", {"replace": "dog"}, "--replace dog: .* knows no such class; expected one of a, b, c"),
        ("heart", {"replace": "b"}, "--replace b: --classes heart does not name it"),
        ("b", {"replace": "b", "method": "mib"}, "--replace: only constellation-extend has this option, not mib"),
    ],
)
def test_wrong_replacements(
    classes: str,
    options: dict[str, str],
    message: str,
    original: Make,
    photos: Callable[[int], tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    step = _adopted(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        learn(LearnRequest(step, *photos(5), classes, tmp_path / "out", **options), QUIET)
    assert not (tmp_path / "out").exists()
