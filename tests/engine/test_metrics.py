import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from starseg.engine.metrics import summarize


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
    published = summarize(confusion, "abc", 1, published=True)["miou"]
    assert published["new"] == 0 and published["all"] == pytest.approx(200 / 3)


def test_the_foreground_mean_leaves_out_id_0() -> None:
    figures = summarize(np.array([[6, 4, 0], [0, 5, 5], [0, 0, 10]]), "abc", 1)
    iou = figures["iou"]
    assert figures["miou_foreground"]["old"] == iou["b"] and figures["miou_foreground"]["new"] == iou["c"]
    assert figures["miou_foreground"]["all"] == pytest.approx((iou["b"] + iou["c"]) / 2)


def test_a_step_without_new_classes_has_no_new_figures() -> None:
    figures = summarize(np.diag([5, 5]), "ab", 1)
    assert figures["miou"]["new"] is figures["pixel_accuracy"]["new"] is None
