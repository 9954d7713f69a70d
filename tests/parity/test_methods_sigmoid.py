"""SSUL, DKD and Adapter against ssul.npz, dkd.npz and adapter.npz (docs/reference/golden.md)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from parity.golden import check_close
from parity.golden_methods import answering, batch_of, golden, make_method, step_context
from starseg.config import PUBLISHED, SOUND, Choices
from starseg.data.samples import Batch
from starseg.losses.distillation import sigmoid_kd, sign_split
from starseg.losses.star import bce_per_class, ocfm, sad, top_two, uncertainty
from starseg.models import Output
from starseg.models.classifiers import copy_head
from starseg.ops.bilinear import resize
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import make_adapter_plan
from starseg.tasks import TaskSequence

# --- SSUL ---


def _ssul(choices: Choices = SOUND) -> tuple:
    """SSUL in the golden step, the golden arrays, and the labels of that step and of a memory image."""
    g = golden("ssul")
    old, new = (tuple(g[k].tolist()) for k in ("old_ids", "new_ids"))
    names = tuple(map(str, range(1 + max(old + new))))
    task = TaskSequence("golden", (old, new), names)
    ctx = replace(step_context(len(old), len(new)), task=task, choices=choices)
    raw = g["raw"].long()
    labels, all_seen = (torch.from_numpy(task.relabelling(1, kind))[raw] for kind in ("train", "test"))
    return make_method("ssul", ctx), g, labels, all_seen


def test_ssul_labels() -> None:
    method, g, labels, all_seen = _ssul()
    assert torch.equal(labels.long(), g["labels_train_plain"])
    saliency = g["saliency"]
    assert torch.equal(method.targets(batch_of(labels, saliency=saliency), None), g["labels_train_unknown"])
    assert torch.equal(method.targets(batch_of(labels), None), g["labels_ade_unknown"])
    assert torch.equal(
        method.targets(batch_of(labels, saliency=saliency), g["logits_prev"]),
        g["pseudo_labels"],
    )
    exemplars = batch_of(all_seen, saliency=saliency * 0, exemplar=torch.ones(len(labels), dtype=torch.bool))
    assert torch.equal(method.targets(exemplars, None), g["labels_memory_shifted"])
    published, *_ = _ssul(PUBLISHED)
    assert torch.equal(published.targets(exemplars, None), g["labels_memory_published"])


def test_ssul_loss_and_prediction() -> None:
    method, g, labels, _ = _ssul()
    logits = g["logits"].requires_grad_()
    batch = batch_of(labels, saliency=g["saliency"])
    losses = method.losses(batch, answering(logits), answering(g["logits_prev"]))
    check_close(losses["bce"], g["loss"])
    losses["bce"].backward()
    check_close(logits.grad, g["grad"])
    assert torch.equal(method.rule(SOUND)(g["logits"]), g["prediction"])


def test_ssul_loss_pixel_by_pixel() -> None:
    method, g, labels, _ = _ssul()
    targets = method.targets(batch_of(labels, saliency=g["saliency"]), g["logits_prev"])
    last, h, w = (size - 1 for size in targets.shape)
    for n, i, j in [(0, 0, 0), (0, h // 3, w // 2), (last, h, w // 4)]:
        pixel = (slice(n, n + 1), slice(i, i + 1), slice(j, j + 1))
        value = bce_per_class(g["logits"].movedim(1, -1)[pixel].movedim(-1, 1), targets[pixel], 0).sum()
        assert value.item() == pytest.approx(g["loss_map"][n, i, j].item(), rel=1e-5)


# --- DKD ---


class Heads(nn.Module):
    """The golden heads as a network's; features are answered as they are."""

    def __init__(self, g: dict, which: str) -> None:
        super().__init__()
        self.features = g[f"x_{which}"].clone().requires_grad_(which == "new")
        heads = []
        for i in range(len([k for k in g if k.startswith(f"{which}_w")])):
            weight, bias = g[f"{which}_w{i}"], g[f"{which}_b{i}"]
            heads.append(nn.Conv2d(weight.shape[1], len(weight), 1))
            heads[-1].load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
        self.auxiliary, *heads = heads
        self.heads = nn.ModuleList(heads)
        self.mean = torch.zeros(1)

    def __call__(self, images: Tensor, extra_features: Tensor | None = None, maps: bool = False) -> Output:
        x = self.features
        logits = torch.cat([self.auxiliary(x.detach()), *(head(x) for head in self.heads)], 1)
        return Output(x, logits)


def _dkd(pos_weight: float = 1.0) -> tuple:
    """DKD's losses with the published treatment of ignored pixels, the golden arrays and the networks."""
    g = golden("dkd")
    new, old = Heads(g, "new"), Heads(g, "old")
    classes = [head.out_channels for head in new.heads]
    ctx = step_context(sum(classes[:-1]), classes[-1], choices=PUBLISHED, model=new, old_model=old)
    steps = torch.arange(1, 1 + sum(classes)).split(classes)
    task = TaskSequence("golden", tuple(tuple(s.tolist()) for s in steps), ctx.task.names)
    ctx = replace(ctx, task=task, step=len(classes) - 1)
    method = make_method("dkd", ctx, pos_weight=pos_weight)
    return method.losses(batch_of(g["labels"]), new, old), g, new, old


@pytest.mark.parametrize(("pos_weight", "suffix"), [(1.0, ""), (35.0, "_pw35")])
def test_dkd_total(pos_weight: float, suffix: str) -> None:
    losses, g, new, _ = _dkd(pos_weight)
    check_close(losses["mbce"], g[f"mbce{suffix}"].sum())
    check_close(sum(losses.values()), g[f"total{suffix}"])
    if not suffix:
        sum(losses.values()).backward()
        check_close(new.features.grad, g["grad_x"])
        for i, head in enumerate([new.auxiliary, *new.heads]):
            check_close(head.weight.grad[:, :, 0, 0], g[f"grad_w{i}"])
            check_close(head.bias.grad, g[f"grad_b{i}"])


@pytest.mark.parametrize(
    ("term", "name", "weight"), [("mbce", "mbce", 1), ("kd", "kd", 5), ("dkd+", "dkd_pos", 5), ("dkd-", "dkd_neg", 5)]
)
def test_dkd_terms(term: str, name: str, weight: float) -> None:
    losses, g, new, _ = _dkd()
    check_close(losses[term] / weight, g[name].sum())
    (losses[term] / weight).backward()
    check_close(new.features.grad, g[f"grad_x_{name}"])


def test_dkd_auxiliary_term() -> None:
    losses, g, new, _ = _dkd()
    check_close(losses["ac"], g["ac"].sum())
    losses["ac"].backward()
    check_close(new.features.grad, g["grad_x_ac"])
    assert not new.features.grad.any()


def test_dkd_terms_per_class() -> None:
    _, g, new, old = _dkd()
    known = len(g["kd"])
    small = [network(None).logits[:, 1 : 1 + known] for network in (new, old)]
    logits = [resize(z, g["labels"].shape[-2:]) for z in small]
    check_close(sigmoid_kd(*logits), g["kd"])
    weights = [torch.cat([head.weight for head in network.heads])[:known] for network in (new, old)]
    parts = [sign_split(network.features, w) for network, w in zip((new, old), weights, strict=True)]
    check_close(sigmoid_kd(parts[0][0], parts[1][0]), g["dkd_pos"])
    check_close(sigmoid_kd(parts[0][1], parts[1][1]), g["dkd_neg"])


def test_dkd_gradient_of_the_logits() -> None:
    _, g, new, old = _dkd()
    labels = g["labels"]
    logits, old_logits = (resize(n(None).logits.detach(), labels.shape[-2:]) for n in (new, old))
    logits.requires_grad_()
    known = len(g["kd"])
    loss = sigmoid_kd(logits[:, 1 : 1 + known], old_logits[:, 1:]).sum()
    loss = loss + bce_per_class(logits[:, 1 + known :], labels, 1 + known, ignored_as_negatives=True).sum()
    loss.backward()
    check_close(logits.grad, g["grad_logits_kd_plus_mbce"])


def test_dkd_initialisation_and_prediction() -> None:
    _, g, new, _ = _dkd()
    classes, channels = g["init_new_weight"].shape
    source, target = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, classes, 1)
    source.load_state_dict({"weight": g["init_aux_weight"][:, :, None, None], "bias": g["init_aux_bias"]})
    copy_head(source, target)
    check_close(target.weight[:, :, 0, 0], g["init_new_weight"])
    check_close(target.bias, g["init_new_bias"])
    logits = resize(new(None).logits, g["labels"].shape[-2:])
    assert torch.equal(make_method("dkd", step_context(1, 1)).rule(PUBLISHED)(logits), g["prediction"])


# --- Adapter ---


def test_uncertainty_constraint() -> None:
    g = golden("adapter")
    logits = g["logits"].requires_grad_()
    best, second, _ = top_two(logits)
    check_close(best - second, g["certainty"])
    loss = uncertainty(logits, g["labels"])
    loss.backward()
    check_close(loss, g["uac"])
    check_close(logits.grad, g["uac_grad"])


def test_feature_terms() -> None:
    g = golden("adapter")
    old, new = g["prototypes"].shape[0], g["logits"].shape[1] - g["prototypes"].shape[0]
    features = g["features"].requires_grad_()
    cpd = sad(features, g["labels"], old + 1, new, g["prototypes"], absent_classes=True, epsilon=1e-12)
    cpd.backward()
    check_close(cpd, g["cpd"])
    check_close(features.grad, g["cpd_grad"])
    features = g["features"].detach().requires_grad_()
    change = ocfm(features, g["features_old"], g["pkd_region"].bool(), epsilon=1e-4)
    change.backward()
    check_close(change, g["pkd"])
    check_close(features.grad, g["pkd_grad"])
    assert ocfm(features, g["features_old"], g["pkd_region"] > 1, epsilon=1e-4) == g["pkd_empty"] == 0


def _bank(g: dict) -> PrototypeBank:
    counts = torch.cat([torch.ones(1), g["adc_counts"]])
    zeros = torch.zeros(len(g["adc_counts"]))
    return PrototypeBank(counts, g["adc_prototypes"], g["adc_noise"], zeros, zeros)


def test_prototypes_follow_the_features() -> None:
    """Through Adapter's own end_step, on the sampled grid (output stride 1)."""
    g = golden("adapter")
    batches = range(len([k for k in g if k.startswith("adc_labels")]))

    def network(which: str) -> object:
        def answer(images: Tensor) -> Output:
            i = int(images)
            return Output(g[f"adc_features_{which}{i}"], g[f"adc_logits_{which}{i}"])

        return answer

    old = len(g["adc_counts"])
    ctx = step_context(
        old,
        g["adc_logits_new0"].shape[1] - old,
        old_model=network("old"),
        scan=lambda name: (Batch(torch.tensor(i), g[f"adc_labels{i}"], torch.zeros(1)) for i in batches),
    )

    class Model(SimpleNamespace):
        __call__ = staticmethod(network("new"))

    ctx = replace(ctx, model=Model(mean=torch.zeros(1), stride=1))
    method = make_method("adapter", ctx)
    method.bank = _bank(g)
    method.plan = SimpleNamespace(carried=method.bank.counts)
    method.end_step(ctx)
    check_close(method.bank.prototypes[:old], g["adc_prototypes_after"])
    check_close(method.bank.noise[:old], g["adc_noise_after"])
    assert torch.equal(method.bank.prototypes[old - 1], g["adc_prototypes"][-1]) == (
        torch.equal(g["adc_prototypes"][-1], g["adc_prototypes_after"][-1])
    )


@pytest.mark.parametrize("case", ["overlap", "overlap_covered", "disjoint"])
def test_replay_plan(case: str) -> None:
    g = golden("adapter")
    labelled = g[f"plan_{case}_new_counts"][1:]
    plan = make_adapter_plan(
        case.split("_")[0], g["plan_counts"], g[f"plan_{case}_seen"], labelled, int(g["plan_iterations"])
    )
    assert plan.per_iteration.tolist() == g[f"plan_{case}_per_iteration"].tolist()
    check_close(torch.tensor(plan.background_ratio), g[f"plan_{case}_bg_ratio"])
    check_close(torch.cat([plan.carried, labelled]), g[f"plan_{case}_totals"])
