"""Evaluator, prediction rule, schedules, tasks, filters and masks (docs/reference/golden.md, "STAR's files")."""

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.classification import multiclass_confusion_matrix

from parity.golden import arrays, cases, document, tensors
from starseg.data.datasets import DATASETS
from starseg.data.selection import select_images
from starseg.engine.fit import lr_factor
from starseg.engine.metrics import summarize
from starseg.methods import METHODS
from starseg.models.prediction import LargestLogit
from starseg.tasks import TaskSequence

FIGURES = {
    "Pixel_Accuracy": "pixel_accuracy",
    "Pixel_Accuracy_Class": "class_accuracy",
    "Mean_Intersection_over_Union": "miou",
}
BY_CLASS = {"Pixel_Accuracy_Class": "accuracy", "Mean_Intersection_over_Union": "iou"}
GROUPS = {"old": "old", "new": "new", "overall": "all", "harmonic": "harmonic"}


def _confusion(label: torch.Tensor, pred: torch.Tensor, classes: int) -> np.ndarray:
    return multiclass_confusion_matrix(pred.long(), label.long(), classes, ignore_index=255).numpy()


@pytest.mark.parametrize("case", [c for c in cases("evaluator") if c != "saturated"])
def test_evaluator(case: str) -> None:
    g, first = tensors("evaluator"), tensors("evaluator", "random/")
    own = tensors("evaluator", f"{case}/")
    data = own if "label" in own else first
    classes, base = int(first["num_class"]), len(first["old"]) - 1
    if case == "random_nonew":
        base = classes - 1
    confusion = _confusion(data["label"], data["pred"], classes)
    if "confusion" in own:
        assert np.array_equal(confusion, own["confusion"].numpy())
    figures = summarize(confusion, [str(i) for i in range(classes)], base, iou_epsilon=1e-6, absent_as_zero=True)
    for name, ours in FIGURES.items():
        for group, key in GROUPS.items():
            if (want := g.get(f"{case}/{name}/{group}")) is not None:
                assert figures[ours][key] == pytest.approx(float(want), rel=1e-12, abs=1e-10), (name, group)
    for name, ours in BY_CLASS.items():
        got = [np.nan if v is None else v for v in figures[ours].values()]
        np.testing.assert_allclose(got, own[f"{name}/by_class"].numpy(), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("case", ["rule", "saturated"])
def test_prediction_rule(case: str) -> None:
    g = tensors("evaluator", f"{case}/")
    assert torch.equal(LargestLogit(argmax_of_sigmoids=True)(g["logits"]), g["pred"].long())
    ties = (g["logits"].sigmoid() == 1).sum(1) > 1
    assert torch.equal(LargestLogit()(g["logits"])[~ties], g["pred"][~ties].long())


@pytest.mark.parametrize("case", cases("lr_schedules", depth=3))
def test_schedule(case: str) -> None:
    g = arrays("lr_schedules")
    dataset, step, _ = case.split("/")
    schedule = METHODS["star"].recipes[dataset]
    phase = schedule.base if step == "step0" else schedule.later
    assert phase.lr == g[f"{case}/base_lr"]
    total = int(g[f"{case}/max_iters"])
    groups = [{"params": [torch.zeros(1)], "lr": phase.lr * m} for m in g[f"{case}/multipliers"].tolist()]
    optimizer = SGD(groups, lr=phase.lr)
    scheduler = LambdaLR(optimizer, lambda i: lr_factor(i, total, schedule.warmup))
    rates = []
    for _ in g[f"{case}/lr"]:
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, g[f"{case}/lr"], rtol=0, atol=1e-12 * np.max(rates))


def test_tasks() -> None:
    for dataset, want in document("tasks").items():
        got = {name: {str(i): list(s) for i, s in enumerate(t)} for name, t in DATASETS[dataset].tasks.items()}
        assert got == want


def _task(dataset: str, name: str, setting: str = "overlap") -> TaskSequence:
    steps = tuple(tuple(s) for s in document("tasks")[dataset][name].values())
    size = 1 + max(c for s in document("tasks")[dataset]["joint"].values() for c in s)
    return TaskSequence(name, steps, tuple(map(str, range(size))), setting)


@pytest.mark.parametrize("case", document("data_filters"), ids=lambda c: "-".join(map(str, list(c.values())[:4])))
def test_image_selection(case: dict) -> None:
    masks = arrays("data_masks")[f"{case['dataset']}/masks"]
    pixels = np.stack([np.bincount(m.ravel(), minlength=256) for m in masks])
    task = _task(case["dataset"], case["task"], case["setting"])
    for kind in ("train", "val", "test"):
        assert select_images(pixels, task, case["step"], kind).tolist() == case[kind]


@pytest.mark.parametrize("case", cases("data_masks", "masked/", depth=5))
def test_relabelling(case: str) -> None:
    g = arrays("data_masks")
    dataset, name, step, split, fill = case.split("/")
    task, t = _task(dataset, name), int(step.removeprefix("step"))
    table = task.relabelling(t, split, int(fill.removeprefix("mask")))
    back = np.arange(256)
    back[: 1 + len(task.seen(t))] = task.dataset_ids(t)
    want = g[f"masked/{case}"]
    assert np.array_equal(back[table[g[f"{dataset}/masks"][: len(want)]]], want)
