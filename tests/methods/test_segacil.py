"""SegACIL: the classifier of every step is the ridge regression on all cells seen, whatever the steps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import starseg
from starseg.config import parse_config
from starseg.contract import MethodHarness, tiny_settings
from starseg.engine.checkpoint import load_info, load_model
from starseg.engine.runner import Runner
from starseg.errors import UserError
from starseg.methods.segacil import pseudo_labels
from starseg.models import Segmenter
from starseg.models.classifiers import HeadLayout, linear_classifier
from starseg.replay.statistics import sample_at_stride

WIDTH, GAMMA = 48, 0.7


def _run(uncertainty: float = 0.0) -> MethodHarness:
    return MethodHarness("segacil", options={"width": WIDTH, "gamma": GAMMA, "uncertainty": uncertainty})


def _weight(model: Segmenter) -> Tensor:
    """Return the classifier [1 + K, F], the background first; it has no biases."""
    weight, bias = linear_classifier([model.lead["background"], *model.heads])
    assert not bias.any()
    return weight.double()


def _cells(model: Segmenter, run: MethodHarness, step: int) -> tuple[Tensor, Tensor]:
    batch = run.batch(step)
    with torch.no_grad():
        expanded = model.hidden(model(batch.images).features)
    labels = sample_at_stride(batch.labels, model.stride).flatten().long()
    features = expanded.movedim(1, -1).flatten(0, 2).double()
    return features[labels != 255], labels[labels != 255]


def test_three_steps_equal_one_joint_ridge_regression() -> None:
    run = _run()
    run.walk(3)
    model = run.model
    cells = [_cells(model, run, step) for step in range(3)]
    features, labels = (torch.cat(parts) for parts in zip(*cells, strict=True))
    rows = torch.cat([features, GAMMA**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    targets = F.pad(F.one_hot(labels, 6).double(), (0, 0, 0, WIDTH))
    joint = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(_weight(model), joint, atol=1e-6, rtol=1e-5)


def test_only_the_classifier_changes_after_step_0() -> None:
    run = _run()
    run.walk(1)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.walk(3)
    after = run.model.state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    changed = before.keys() - set(same)
    assert changed == {"lead.background.weight", "heads.0.weight"}
    assert not after["hidden.0.bias"].any() and not any(p.requires_grad for p in run.model.parameters())


def test_the_random_layer_is_fixed_by_the_seed() -> None:
    """It is that of the network as it was built, before training changed anything."""
    layers = []
    for _ in range(2):
        run = _run()
        run.walk(1)
        layers.append(run.model.hidden[0].weight)
    assert torch.equal(*layers) and layers[0].shape == (WIDTH, run.model.width, 1, 1)


def test_background_takes_confident_predictions() -> None:
    labels = torch.tensor([[[0, 0, 0, 3, 255]]], dtype=torch.uint8)
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.1, 0.2, 0.3], [0.8, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    scores = scores.T[None, :, None]
    assert pseudo_labels(labels, scores, 0.4).tolist() == [[[1, 0, 0, 3, 255]]]
    assert pseudo_labels(labels, scores, 0.5).tolist() == [[[1, 2, 0, 3, 255]]]
    assert pseudo_labels(labels, scores, 0.0).tolist() == [[[0, 0, 0, 3, 255]]]


def test_pseudo_labels_change_the_classifier() -> None:
    weights = []
    for uncertainty in (0.0, 0.5):
        run = _run(uncertainty)
        run.walk(2)
        weights.append(_weight(run.model))
    assert not torch.allclose(*weights)


def test_a_step_without_the_sums_is_refused() -> None:
    run = _run()
    run.walk(1)
    without = MethodHarness("segacil", options=run.options, model=run.model, state={})
    with pytest.raises(UserError, match="step 1: segacil needs the sums of products of 3 old classes"):
        without.walk(2)


def test_the_random_layer_is_in_the_files_of_a_step(shapes: Path, tmp_path: Path) -> None:
    settings = tiny_settings("segacil", shapes, tmp_path / "run") | {"segacil": {"width": WIDTH}}
    with Runner(parse_config(settings), Console(quiet=True), range(2)) as runner:
        step = runner.run() / "step_1"
    assert load_info(step).layout == HeadLayout(("background",), hidden=WIDTH)
    model, _ = load_model(step)
    assert model.hidden[0].weight.shape[0] == WIDTH
    image = next((shapes / "JPEGImages").iterdir())
    assert starseg.load(step, "cpu").predict(image).max() <= 4


def test_onnx(shapes: Path, tmp_path: Path) -> None:
    """The exported network has the random layer, too."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from starseg.inference.onnx import export_onnx

    settings = tiny_settings("segacil", shapes, tmp_path / "run") | {"segacil": {"width": WIDTH}}
    with Runner(parse_config(settings), Console(quiet=True), range(1)) as runner:
        step = runner.run() / "step_0"
    image = next((shapes / "JPEGImages").iterdir())
    agreement = export_onnx(step, tmp_path / "net.onnx", Console(quiet=True), images=[str(image)])
    assert agreement.masks >= 0.999
