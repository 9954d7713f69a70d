"""`starseg learn` adds a class to an adopted network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from adoption.originals import images, randomise
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.adoption.bank import measure_bank, to_sigmoid
from starseg.data.images import read_mask
from starseg.engine.checkpoint import load_bank, load_info, load_model
from starseg.errors import UserError
from starseg.finetuning.run import LearnRequest, learn
from starseg.inference.predictor import step_rule
from starseg.models.classifiers import last_layer, linear_classifier
from starseg.models.foreign import torchvision as tv
from starseg.replay.bank import PrototypeBank
from starseg.replay.derivation import derive_prototypes

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from starseg.models import Architecture

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lraspp.pth"
    network = tv.create(Architecture("lraspp_mobilenet_v3_large", builder="torchvision"), 4)
    torch.save(randomise(network, (64, 64)).state_dict(), path)
    return path


@pytest.fixture
def hearts(shapes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Photos and masks that label hearts alone, as 1."""
    images, masks = tmp_path / "photos", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for mask in sorted(shapes.glob("SegmentationClassAug/*.png")):
        if (ids := np.asarray(read_mask(mask)) == 5).any():
            Image.fromarray(ids.astype(np.uint8)).save(masks / mask.name)
            (images / f"{mask.stem}.jpg").symlink_to(shapes / "JPEGImages" / f"{mask.stem}.jpg")
    return images, masks


def _adopted(weights: Path, out: Path, classes: str = "background,a,b,c", **options: object) -> Path:
    request = AdoptRequest("torchvision:lraspp_mobilenet_v3_large", out, str(weights), classes, crop=64)
    return adopt(AdoptRequest(**{**request.__dict__, **options}), QUIET)


@pytest.mark.parametrize("method", ["lwf", "mib", pytest.param("plop", marks=pytest.mark.slow)])
def test_a_class_is_learnt(method: str, weights: Path, hearts: tuple[Path, Path], tmp_path: Path) -> None:
    step = _adopted(weights, tmp_path / "run")
    console = Console(record=True, width=120)
    request = LearnRequest(step, *hearts, "heart", tmp_path / "out", method, epochs=1)
    learnt = learn(request, console)
    assert learnt is not None
    info = load_info(learnt)
    assert info.names == ["background", "a", "b", "c", "heart"] and info.head_sizes == [3, 1]
    assert info.architecture == load_info(step).architecture
    shown = console.export_text()
    assert "cells found in" in shown and "backbone lraspp_mobilenet_v3_large" in shown


def test_methods_that_need_a_bank_name_others(weights: Path, hearts: tuple[Path, Path], tmp_path: Path) -> None:
    step = _adopted(weights, tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"star cannot continue .*; or give --method constellation-extend or ewf or ilt or lwf or mib or plop",
    ):
        learn(LearnRequest(step, *hearts, "heart", tmp_path / "out", "star"), QUIET)


def test_star_continues_with_a_bank_from_unlabelled_photos(
    weights: Path, hearts: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = _adopted(weights, tmp_path / "plain")
    console = Console(record=True, width=120)
    step = _adopted(weights, tmp_path / "run", photos=str(hearts[0]))
    (model, info), (softmax, _) = load_model(step), load_model(plain)
    assert (info.method, info.lead) == ("star", [])
    pixels = images((64, 64), 4)
    expected = softmax.predict(pixels).argmax(1)
    assert expected.unique().numel() > 1
    assert (step_rule(info)(model.predict(pixels)) == expected).float().mean() > 0.9999
    assert PrototypeBank.fits(load_bank(step))
    learnt = learn(LearnRequest(step, *hearts, "heart", tmp_path / "out", epochs=1), console)
    assert learnt is not None and load_info(learnt).head_sizes == [3, 1]
    assert "stored cells" in console.export_text()


@torch.no_grad()
def test_a_class_that_never_shows_gets_a_derived_prototype(
    weights: Path, hearts: tuple[Path, Path], tmp_path: Path
) -> None:
    model = to_sigmoid(load_model(_adopted(weights, tmp_path / "run"))[0])
    photos = sorted(hearts[0].iterdir())
    whole = measure_bank(model, photos, 64)
    head = last_layer(model.heads[0])
    assert head.bias is not None
    head.bias[0] = -1e3
    measured = measure_bank(model, photos, 64)
    assert measured.cells[0] == 0 and whole.images == measured.images == len(photos)
    torch.testing.assert_close(measured.bank.prototypes[0], derive_prototypes(*linear_classifier(model.heads))[0])
    assert measured.bank.present.all() and measured.bank.norm_mean[0] > 0
    assert measured.bank.counts[1] == measured.bank.counts[2:].median()
    head.bias.fill_(-1e3)
    with pytest.raises(UserError, match="--photos: the network finds none of its classes in"):
        measure_bank(model, photos, 64)


def test_photos_need_a_background(weights: Path, hearts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--photos: torchvision:.* has no background class"):
        _adopted(weights, tmp_path / "run", "d,a,b,c", background=False, photos=str(hearts[0]))
