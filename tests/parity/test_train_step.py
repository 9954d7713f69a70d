"""One training iteration through STAR's own begin_step and losses (docs/reference/golden.md, train_step_voc.npz)."""

import pytest
import torch

from parity.golden import cases, check_close, tensors
from parity.stubs import Heads, numbered, star, star_context
from starseg.losses.star import background_cells, negatives_per_class
from starseg.methods.star import Star
from starseg.ops.bilinear import resize, subsample_to_support
from starseg.replay.bank import PrototypeBank
from starseg.replay.statistics import old_model_labels, sample_at_stride

VARIANTS = [(f, v) for f in ("voc", "ade") for v in cases(f"train_step_{f}") if v != "nobg"]


class Iteration:
    """The inputs of a variant, and STAR brought to the point where it sees the last batch."""

    def __init__(self, dataset: str, variant: str, **options: float) -> None:
        g = tensors(f"train_step_{dataset}")
        self.want = {k.removeprefix(f"{variant}/"): v for k, v in g.items() if k.startswith(f"{variant}/")}
        parts = [g] if not variant.endswith("_nobg") else [g, tensors(f"train_step_{dataset}", "nobg/")]
        n_old, n_new = int(g["n_old"]), int(g["n_new"])
        self.batches = numbered([p["label"] for p in parts])
        old = Heads([p["x_pl_old"] for p in parts], g["old_cls_weight"], g["old_cls_bias"])
        self.features = parts[-1]["x_pl_new"].requires_grad_()
        self.heads = [g[f"new_cls{i}_{n}"].requires_grad_() for i in (0, 1) for n in ("weight", "bias")]
        weight, bias = torch.cat(self.heads[0::2]), torch.cat(self.heads[1::2])
        self.new = Heads([*(p["x_pl_new"] for p in parts[:-1]), self.features], weight, bias)
        self.old = old
        self.old_logits = parts[-1]["old_logits"]
        stride = g["label"].shape[-1] // g["x_pl_new"].shape[-1]
        self.method: Star = star(pos_weight=float(g["pos_weight"]), **options)
        mean, std = g["prev_norm_mean_and_std"]
        self.method.bank = PrototypeBank(g["prev_numbers"], g["prev_prototypes"], g["prev_noise"], mean, std)
        setting = variant.split("_")[0]
        self.ctx = star_context(setting, n_old, n_new, self.batches, stride, old)
        self.method.begin_step(self.ctx)
        self.weights = dict(zip(("mbce", "ocfm", "sad"), g["hyper_mbce_pkd_cont"].tolist(), strict=True))

    def losses(self) -> dict[str, torch.Tensor]:
        return self.method.losses(self.batches[-1], self.new, self.old)


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_plan_of_the_step(dataset: str, variant: str) -> None:
    it = Iteration(dataset, variant)
    plan, want = it.method.plan, it.want
    assert plan.per_iteration.tolist() == want["per_iter_prev_number"].tolist()
    check_close(torch.tensor(plan.background_ratio), want["extra_bg_ratio"])
    check_close(torch.tensor(plan.background_owed), want["prev_bg_number"])
    check_close(plan.carried, want["updated_numbers"][: len(plan.carried)])


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_regions_and_replayed_features(dataset: str, variant: str) -> None:
    it = Iteration(dataset, variant)
    batch, want = it.batches[-1], it.want
    small = it.old(batch.images).logits
    check_close(resize(small, batch.labels.shape[-2:]), it.old_logits)
    grid = small.shape[2:]
    labels, seen = old_model_labels(batch.labels, small, grid, it.method.options.old_threshold)
    assert torch.equal(seen, subsample_to_support(want["old_pred"].long(), grid))
    region = ((labels == 0) & (seen > 0)).float()
    assert torch.equal(resize(region[:, None], grid), resize(want["pseudo_label_region"][:, None].float(), grid))
    stride = seen.shape[-1] // grid[-1]
    cells = background_cells(sample_at_stride(labels, stride), sample_at_stride(seen, stride))
    assert torch.equal(cells, want["region_bg"].bool())
    replayed = it.method.bank.draw(it.method.plan.rows, it.ctx.generator)
    check_close(replayed.T, want["fake_features"])
    check_close(it.new.classify(replayed).T, want["logits_fake"])


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_terms(dataset: str, variant: str) -> None:
    it = Iteration(dataset, variant)
    want, n_old, output = it.want, it.ctx.old_classes, it.new(it.batches[-1].images)
    check_close(output.logits, want["logits_small"])
    check_close(it.method.class_loss(it.batches[-1], output), want["loss_mbce_ori"])
    check_close(negatives_per_class(want["logits_fake"].T[:, n_old:])[0], want["loss_mbce_fake"])
    if "logits_extra_bg" in want:
        check_close(negatives_per_class(want["logits_extra_bg"].T[:, n_old:])[0], want["loss_mbce_extra_bg"])


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_total_and_gradients(dataset: str, variant: str) -> None:
    it = Iteration(dataset, variant)
    losses, want, w = it.losses(), it.want, it.weights
    check_close(losses["mbce"], w["mbce"] * want["loss_mbce"].sum())
    check_close(losses["ocfm"], w["ocfm"] * want["loss_pkd"])
    check_close(losses["sad"], w["sad"] * want["loss_cont"])
    total = sum(losses.values())
    check_close(total, want["loss_total"])
    total.backward()
    check_close(it.features.grad, want["grad_x_pl"])
    check_close(it.heads[2].grad, want["grad_cls1_weight"])
    check_close(it.heads[3].grad, want["grad_cls1_bias"])
    assert want["grad_cls0_is_zero"] and it.heads[0].grad.abs().max() == it.heads[1].grad.abs().max() == 0


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_gradient_of_each_term(dataset: str, variant: str) -> None:
    for term, name in (("mbce", "mbce"), ("ocfm", "pkd"), ("sad", "cont")):
        it = Iteration(dataset, variant, **{term: 1.0})
        if (want := it.want.get(f"grad_x_pl_{name}_only")) is not None:
            it.losses()[term].backward()
            check_close(it.features.grad, want)


def test_some_variant_has_gradients_by_term() -> None:
    assert any("grad_x_pl_mbce_only" in Iteration(*v).want for v in VARIANTS)


@pytest.mark.parametrize(("dataset", "variant"), VARIANTS)
def test_gradient_of_the_small_logits(dataset: str, variant: str) -> None:
    """The stored gradient is that of the main branch; the background branch's share is taken off ours."""
    it = Iteration(dataset, variant)
    n_old, want, batch = it.ctx.old_classes, it.want, it.batches[-1]
    output = it.new(batch.images)
    logits = output.logits.detach().requires_grad_()
    grown = it.method.losses(
        batch,
        lambda images, extra=None: output._replace(logits=logits, extra_logits=it.new(images, extra).extra_logits),
        it.old,
    )
    grown["mbce"].backward()
    cells = want["region_bg"].bool()
    share = want["weight_extra_bg"] / (1 + want["weight_fake"] + want["weight_extra_bg"]) / max(int(cells.sum()), 1)
    background = torch.zeros_like(logits)
    background[:, n_old:] = share * logits.detach()[:, n_old:].sigmoid() * cells[:, None]
    check_close(logits.grad - background, want["grad_logits_small"])
