"""Feature statistics, the prototype bank and the replay plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import make_plan
from starseg.replay.statistics import FeatureStatistics, sample_at_stride


def _measure(features: torch.Tensor, labels: torch.Tensor, classes: int, cuts: list[int]) -> PrototypeBank:
    statistics = FeatureStatistics.zeros(classes, features.shape[1])
    for a, b in zip([0, *cuts], [*cuts, len(features)], strict=True):
        statistics.update(features[a:b], labels[a:b])
    return statistics.finish()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 11), max_size=4).map(sorted))
def test_statistics_do_not_depend_on_the_batches(seed: int, cuts: list[int]) -> None:
    torch.manual_seed(seed)
    features, labels = 5 * torch.randn(12, 8, 3, 3), torch.randint(0, 4, (12, 3, 3))
    once, parts = (_measure(features, labels, 3, c) for c in ([], cuts))
    for a, b in zip(once.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_statistics_equal_the_formulas() -> None:
    features, labels = 5 * torch.randn(6, 8, 3, 3, dtype=torch.float64), torch.randint(0, 3, (6, 3, 3))
    bank = _measure(features.float(), labels, 2, [2])
    vectors = features.float().double().movedim(1, -1)
    for k in (1, 2):
        v = vectors[labels == k]
        unit = v / v.norm(dim=1, keepdim=True)
        prototype = unit.sum(0) / unit.sum(0).norm()
        torch.testing.assert_close(bank.prototypes[k - 1].double(), prototype, rtol=1e-6, atol=1e-6)
        noise = (unit - prototype).square().mean(0).sqrt()
        torch.testing.assert_close(bank.noise[k - 1].double(), noise, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bank.norm_std[k - 1].double(), v.norm(dim=1).std(), rtol=1e-5, atol=1e-6)
        assert bank.counts[k] == (labels == k).sum()


def test_classes_with_one_cell_or_none() -> None:
    features, labels = torch.randn(1, 8, 2, 2), torch.tensor([[[0, 1], [0, 255]]])
    bank = _measure(features, labels, 2, [])
    assert bank.counts.tolist() == [2, 1, 0]
    assert bank.norm_std.tolist() == [0, 0]
    assert bank.present.tolist() == [True, False]
    assert all(t.isfinite().all() for t in bank.state_dict().values())
    assert bank.noise[0].abs().max() < 1e-6 and bank.noise[1].abs().max() == 0


@pytest.mark.parametrize("norms", ["channel", "vector"])
def test_draws_have_the_stored_distribution(norms: str) -> None:
    prototypes = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    bank = PrototypeBank(torch.ones(3), prototypes, torch.full((2, 16), 0.1), torch.tensor([5.0, 9.0]), torch.ones(2))
    rows = torch.zeros(20000, dtype=torch.int64)
    drawn = bank.draw(rows, torch.Generator().manual_seed(0), norms)
    assert drawn.shape == (20000, 16)
    torch.testing.assert_close(drawn.mean(0), 5 * prototypes[0], rtol=0, atol=0.05)
    again = bank.draw(rows, torch.Generator().manual_seed(0), norms)
    assert torch.equal(drawn, again)


def test_a_bank_takes_about_two_kilobytes_per_class() -> None:
    bank = FeatureStatistics.zeros(20, 256).finish()
    assert bank.nbytes == 4 * (1 + 20 * (1 + 256 + 256 + 2))


@pytest.mark.parametrize("setting", ["overlap", "disjoint"])
def test_plan_without_predicted_background(setting: str) -> None:
    plan = make_plan(setting, torch.tensor([100.0, 50.0]), torch.tensor([0, 0]), 1, 10)
    assert plan.background_ratio == 0 and plan.per_iteration.tolist() == [5]


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=5),
    st.integers(1, 500),
    st.sampled_from(["overlap", "disjoint"]),
)
def test_plan_is_never_negative(numbers: list[int], iterations: int, setting: str) -> None:
    stored, predicted = torch.tensor(numbers, dtype=torch.float32), torch.tensor(numbers[::-1])
    plan = make_plan(setting, stored, predicted, 1, iterations)
    assert (plan.per_iteration >= 0).all() and plan.background_ratio >= 0
    assert (plan.carried >= 0).all() and len(plan.carried) == len(stored)


def test_the_grid_starts_at_half_a_stride() -> None:
    labels = torch.arange(64 * 48).reshape(1, 64, 48)
    assert sample_at_stride(labels, 16)[0, :, 0].tolist() == [48 * r + 8 for r in (8, 24, 40, 56)]
