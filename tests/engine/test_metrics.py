import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional.classification import multiclass_confusion_matrix

from starseg.config import SOUND
from starseg.contract import MethodHarness
from starseg.data.samples import Batch
from starseg.engine.evaluate import confusion_matrix
from starseg.engine.metrics import summarize
from starseg.methods import METHODS
from starseg.models.prediction import predict_upsampled
from starseg.tasks import IGNORE


@given(arrays(np.int64, (5, 5), elements=st.integers(0, 1000)))
def test_iou_is_intersection_over_union(confusion: np.ndarray) -> None:
    figures = summarize(confusion, list("abcde"), base=2)
    for i, value in enumerate(figures["iou"].values()):
        union = confusion[i].sum() + confusion[:, i].sum() - confusion[i, i]
        assert value is None if union == 0 else value == pytest.approx(100 * confusion[i, i] / union)
    known = [v for v in list(figures["iou"].values())[:3] if v is not None]
    assert figures["miou"]["old"] == (pytest.approx(np.mean(known)) if known else None)


def test_absent_classes_leave_the_means_unless_published() -> None:
    confusion = np.diag([10, 10, 0])
    assert summarize(confusion, "abc", 1)["miou"] == {"old": 100, "new": None, "all": 100, "harmonic": None}
    published = summarize(confusion, "abc", 1, iou_epsilon=1e-6, absent_as_zero=True)["miou"]
    assert published["new"] == 0 and published["all"] == pytest.approx(200 / 3)


def test_the_foreground_mean_leaves_out_id_0() -> None:
    figures = summarize(np.array([[6, 4, 0], [0, 5, 5], [0, 0, 10]]), "abc", 1)
    iou = figures["iou"]
    assert figures["miou_foreground"]["old"] == iou["b"] and figures["miou_foreground"]["new"] == iou["c"]
    assert figures["miou_foreground"]["all"] == pytest.approx((iou["b"] + iou["c"]) / 2)


def test_a_step_without_new_classes_has_no_new_figures() -> None:
    figures = summarize(np.diag([5, 5]), "ab", 1)
    assert figures["miou"]["new"] is figures["pixel_accuracy"]["new"] is None


def test_confusion_is_torchmetrics() -> None:
    """Which takes 15 GB for 16 crops and 21 classes where algorithms are to be deterministic."""
    model, method = MethodHarness("star").enter(0)[1].model, METHODS["star"]
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(0, 4, (4, 64, 64), dtype=torch.uint8)
    labels[0, :9] = IGNORE
    rule = method(method.Options()).rule(SOUND)
    got = confusion_matrix(model, rule, [Batch(images, labels, torch.arange(4))])
    with torch.inference_mode():
        predicted = predict_upsampled(rule, model.predict(images), labels.shape[-2:])
    want = multiclass_confusion_matrix(predicted, labels.long(), len(got), ignore_index=IGNORE)
    assert np.array_equal(got, want.numpy()) and got.sum() == (labels != IGNORE).sum()
