"""Statistics, counts, replay plan and replayed features (docs/reference/golden.md, "STAR's files")."""

import pytest
import torch

from parity.golden import arrays, check_close, document, tensors
from parity.stubs import numbered
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import make_plan
from starseg.replay.statistics import FeatureStatistics, count_cells, count_ids, old_prediction, sample_at_stride


def _statistics(step: str) -> FeatureStatistics:
    g = tensors("stats", f"{step}/")
    n_old, n_new = int(g["n_old"]), int(g["n_new"])
    statistics = FeatureStatistics.zeros(n_new, g["features"].shape[2])
    for features, labels in zip(g["features"], g["labels"], strict=True):
        grid = sample_at_stride(labels, labels.shape[-1] // features.shape[-1]).long()
        statistics.update(features, torch.where((grid > n_old) & (grid < 255), grid - n_old, grid))
    return statistics


def _check_bank(bank: PrototypeBank, g: dict[str, torch.Tensor]) -> None:
    check_close(bank.prototypes, g["prototypes"])
    check_close(torch.stack([bank.norm_mean, bank.norm_std]), g["norm_mean_and_std"])


def test_statistics_of_the_base_step() -> None:
    g, bank = tensors("stats", "step0/"), _statistics("step0").finish()
    assert bank.counts.tolist() == g["numbers"].tolist()
    _check_bank(bank, g)
    check_close(bank.noise, g["noise"])


@pytest.mark.parametrize(("around_row", "noise"), [(True, "noise_official"), (False, "noise_correct")])
def test_statistics_of_a_later_step(around_row: bool, noise: str) -> None:
    g, base = tensors("stats", "step1/"), _statistics("step0").finish()
    new = _statistics("step1").finish(base, noise_around_row=around_row)
    assert new.counts.tolist() == g["numbers"].tolist()
    bank = base.extend(new, base.counts)
    _check_bank(bank, g)
    check_close(bank.noise, g[noise])
    assert len(bank) == len(bank.counts) - 1 == int(g["n_old"]) + int(g["n_new"])


@pytest.mark.parametrize("case", document("replay_plan"), ids=lambda c: c["name"])
def test_plan(case: dict) -> None:
    stored, predicted = torch.tensor(case["prev_numbers"]), torch.tensor(case["pred_numbers"])
    plan, want = (
        make_plan(case["setting"], stored, predicted, case["n_new"], case["loader_length"]),
        case["expected"],
    )
    assert plan.background_owed == want["prev_bg_number"]
    assert plan.per_iteration.tolist() == want["per_iter_prev_number"]
    assert plan.background_ratio == want["extra_bg_ratio"]
    assert plan.carried.tolist() + case["current_numbers"][1:] == want["updated_numbers"]


def test_predicted_counts() -> None:
    g = tensors("pred_numbers")
    n_old, n_new = len(g["pred_numbers"]) - 1, len(g["current_numbers"]) - 1
    batches = numbered(list(g["labels"]))
    for threshold, name in ((0.5, "pred_numbers"), (0.0, "pred_numbers_if_threshold_were_0")):
        seen = ((b.labels, g["old_logits"][int(b.images)]) for b in batches)
        counts = sum(count_cells(*pair, 16, 1 + n_old + n_new, threshold) for pair in seen)[: 1 + n_old]
        assert counts.tolist() == g[name].tolist()
    labels = sample_at_stride(g["labels"].flatten(0, 1), 16)
    counts = count_ids(labels, 1 + n_old + n_new)
    assert [counts[0].item(), *counts[1 + n_old :].tolist()] == g["current_numbers"].tolist()


def test_old_prediction_uses_raw_logits() -> None:
    logits = torch.tensor([[0.4, 0.6, -1.0], [0.45, 0.5, 0.7]])[None, :, None]
    assert old_prediction(logits, (1, 3), (1, 3)).tolist() == [[[0, 1, 2]]]


def test_replayed_features() -> None:
    g = tensors("replay_features")
    mean, std = g["norm_mean_and_std"]
    bank = PrototypeBank(torch.zeros(1 + len(mean)), g["prototypes"], g["noise"], mean, std)
    rows = torch.repeat_interleave(g["counts"].long())
    check_close(bank.features(rows, g["draw_noise"].T, g["draw_norm"].T), g["fake_features"].T)
    assert arrays("replay_features")["fake_features"].shape[1] == len(rows)
