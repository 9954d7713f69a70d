"""Softmax methods against mib.npz, kd.npz, plop_pseudo.npz and plop_pod.npz (docs/reference/golden.md)."""

import pytest
import torch
from torch import nn

from parity.golden import check_close
from parity.golden_methods import answering, batch_of, golden, make_method, step_context
from starseg.config import PUBLISHED, SOUND
from starseg.losses.distillation import (
    cross_entropy_map,
    local_pod,
    pooled_distillation,
    softmax_kd,
    unbiased_cross_entropy_map,
    unbiased_kd,
)
from starseg.losses.pseudo_labels import entropy, fill_in_certain, published_entropy
from starseg.losses.reduction import mean
from starseg.methods.plop import Plop
from starseg.models.classifiers import share_background


def _classes(g: dict) -> tuple[int, int]:
    """Old classes (without background) and new ones."""
    old = g["logits_old"].shape[1]
    return old - 1, g["logits_new"].shape[1] - old


def test_unbiased_cross_entropy() -> None:
    g = golden("mib")
    logits = g["logits_new"].requires_grad_()
    loss = unbiased_cross_entropy_map(logits, g["labels"], g["logits_old"].shape[1])
    check_close(loss, g["unce_map"])
    check_close(loss[g["labels"] != 255].mean(), g["unce_valid_mean"])
    mean(loss).backward()
    check_close(mean(loss), g["unce"])
    check_close(logits.grad, g["unce_grad"])


@pytest.mark.parametrize(
    ("file", "kd", "name"),
    [("mib", unbiased_kd, "ukd"), ("kd", softmax_kd, "kd")],
)
@pytest.mark.parametrize(("alpha", "suffix"), [(1.0, ""), (2.0, "_alpha2")])
def test_distillation(file: str, kd: object, name: str, alpha: float, suffix: str) -> None:
    g = golden(file)
    logits = g["logits_new"].requires_grad_()
    loss = kd(logits, g["logits_old"], alpha)
    loss.backward()
    check_close(loss, g[f"{name}{suffix}"])
    check_close(logits.grad, g[f"{name}{suffix}_grad"])


def test_plain_cross_entropy() -> None:
    g = golden("kd")
    logits = g["logits_new"].requires_grad_()
    loss = cross_entropy_map(logits, g["labels"])
    check_close(loss, g["ce_map"])
    mean(loss).backward()
    check_close(mean(loss), g["ce"])
    check_close(logits.grad, g["ce_grad"])


@pytest.mark.parametrize(("name", "file"), [("mib", "mib"), ("lwf", "kd"), ("ilt", "kd")])
def test_whole_losses(name: str, file: str) -> None:
    g = golden(file)
    logits = g["logits_new"].requires_grad_()
    body = [g["body_new"].requires_grad_()] if name == "ilt" else None
    method = make_method(name, step_context(*_classes(g)))
    new, old = answering(logits, maps=body), answering(g["logits_old"], maps=[g["body_old"]] if body else None)
    losses = method.losses(batch_of(g["labels"]), new, old)
    total = sum(losses.values())
    check_close(total, g["total" if file == "mib" else f"{name}_total"])
    total.backward()
    check_close(logits.grad, g["total_grad" if file == "mib" else "lwf_total_grad"])
    if body:
        check_close(losses["features"] / 100, g["fd"])
        check_close(body[0].grad / 100, g["fd_grad"])


@pytest.mark.parametrize("case", ["init1", "init2"])
def test_background_initialisation(case: str) -> None:
    g = {k.removeprefix(f"{case}_"): v for k, v in golden("mib").items() if k.startswith(case)}
    n, channels = g["new_weight"].shape[:2]
    background, new = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, n, 1)
    with torch.no_grad():
        background.weight.copy_(g["base_weight"][:1])
        background.bias.copy_(g["base_bias"][:1])
    share_background(background, new)
    check_close(new.weight, g["new_weight"])
    check_close(new.bias, g["new_bias"])
    check_close(background.bias, g["base_bias_after"][:1])
    # The classes' own biases are in other heads here and stay.
    assert torch.equal(g["base_bias"][1:], g["base_bias_after"][1:])


VARIANTS = {
    "published": ({}, True, "thresholds_published"),
    "right": ({"threshold": "binned"}, False, "thresholds_right"),
    "normalised": ({}, False, "thresholds_normalised"),
}


def _plop(variant: str) -> tuple[Plop, dict]:
    """PLOP after its pass over the golden images."""
    g, (options, published, _) = golden("plop_pseudo"), VARIANTS[variant]
    logits, labels = g["scan_logits_old"].float(), g["scan_labels"]

    def scan(name: str) -> object:
        for first in range(0, len(labels), 4):
            yield batch_of(labels[first : first + 4])

    answers = iter([answering(logits[first : first + 4]) for first in range(0, len(labels), 4)])
    choices = PUBLISHED if published else SOUND
    ctx = step_context(*_classes(g), choices=choices, scan=scan, old_model=lambda images: next(answers)(images))
    method = make_method("plop", ctx, **options)
    method.begin_step(ctx)
    return method, g


@pytest.mark.parametrize("variant", VARIANTS)
def test_plop_thresholds(variant: str) -> None:
    method, g = _plop(variant)
    want = g[VARIANTS[variant][2]][: len(method.thresholds)]
    infinite = want.isinf()
    assert torch.equal(method.thresholds.isinf(), infinite)
    # Fine medians are exact to half of 2 ** 17 bins.
    check_close(method.thresholds[~infinite].float(), want[~infinite])
    if variant == "normalised":
        scale = len(want) * float(g["max_entropy"])
        check_close((method.thresholds / scale).clamp_min(0.001).float(), g["thresholds_exact_median"][: len(want)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_plop_pseudo_labels_and_loss(variant: str) -> None:
    method, g = _plop(variant)
    logits = g["logits_new"].requires_grad_()
    method.pod = lambda *_: torch.zeros(())
    losses = method.losses(batch_of(g["labels"]), answering(logits), answering(g["logits_old"]))
    check_close(losses["ce"], g[f"{variant}_loss"])
    losses["ce"].backward()
    check_close(logits.grad, g[f"{variant}_grad"])
    filled, share = fill_in_certain(
        g["labels"], g["logits_old"], method.uncertainty(g["logits_old"]), method.thresholds, method.ctx.first_new
    )
    assert torch.equal(filled, g[f"{variant}_labels"])
    background = g["labels"] < method.ctx.first_new
    assert torch.equal(filled[background] != 255, g[f"{variant}_valid"][background])
    check_close(share, g[f"{variant}_factor"])


def test_entropy() -> None:
    g = golden("plop_pseudo")
    total = int(g["n_total"])
    check_close(published_entropy(g["logits_old"], total), g["entropy"])
    old = g["logits_old"].shape[1]
    check_close(entropy(g["logits_old"]) / (old * g["max_entropy"]), g["entropy"].double())


def _maps(g: dict, which: str) -> list[torch.Tensor]:
    return [g[k] for k in sorted(g) if k.startswith(which) and k[len(which) :].isdigit()]


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_local_pod_through_plop(dataset: str) -> None:
    g = golden("plop_pod")
    new, old = [m.requires_grad_() for m in _maps(g, "new")], _maps(g, "old")
    assert len(new) == int(g["n_layers"])
    n = int(g["n_new"])
    ctx = step_context(int(g["n_total"]) - n - 1, n)
    plop = make_method("plop", ctx, dataset)
    outputs = [answering(m[-1], features=m[-2], maps=m[:-2])(None) for m in (new, old)]
    loss = plop.pod(*outputs)
    check_close(loss, g[f"loss_{dataset}"])
    if dataset == "voc":
        loss.backward()
        for i, m in enumerate(new):
            check_close(m.grad, g[f"grad{i}"])


def test_local_pod() -> None:
    g = golden("plop_pod")
    check_close(local_pod(g["old1"].square()), g["embedding_old1"])
    for i, want in enumerate(g["layer_distance"]):
        distance = (local_pod(g[f"new{i}"].square()) - local_pod(g[f"old{i}"].square())).norm(dim=1)
        check_close(distance, want)


def test_an_unchanged_network_has_finite_gradients() -> None:
    maps = [m.requires_grad_() for m in _maps(golden("plop_pod"), "old")]
    pooled_distillation(maps, [m.detach() for m in maps], [1.0] * len(maps), 2.0).backward()
    assert all(m.grad.isfinite().all() for m in maps)
