"""Mixtures of Gaussians recover what they were fitted to, in one process and in several."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from starseg.contract.checks import _Meeting
from starseg.losses.reduction import identity
from starseg.replay.gaussians import GaussianBank, fit_mixtures

Cells = list[tuple[Tensor, Tensor]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(cells: int, channels: int = 6, seed: int = 0) -> Cells:
    """Two classes and background: class 1 has two far blobs, class 2 one with two correlated channels."""
    draw = generator(seed)
    labels = torch.randint(0, 3, (cells,), generator=draw)
    noise = torch.randn(cells, channels, generator=draw)
    noise[:, 1] = 0.9 * noise[:, 0] + 0.1 * noise[:, 1]
    far = 20 * torch.randint(0, 2, (cells,), generator=draw)
    features = noise + torch.where(labels == 1, far, 3 * labels)[:, None]
    labels[::50] = 255
    return [(f, y) for f, y in zip(features.split(300), labels.split(300), strict=True)]


def fit(cells: Cells, modes: dict[int, int], factors: int = 2) -> tuple[GaussianBank, Tensor]:
    return fit_mixtures(lambda: cells, modes, factors, generator(), identity)


def joined(cells: Cells, class_id: int) -> Tensor:
    return torch.cat([f[y == class_id] for f, y in cells])


def test_a_mixture_has_the_moments_of_its_class() -> None:
    cells = blobs(6000)
    bank, numbers = fit(cells, {0: 3, 1: 2, 2: 1})
    assert numbers.tolist() == [len(joined(cells, c)) for c in range(3)]
    features, ids = bank.draw(torch.tensor([0.0, 20_000.0, 20_000.0]), generator(1))
    assert set(ids.tolist()) == {1, 2} and features.dtype == torch.float32
    for class_id in (1, 2):
        drawn, own = features[ids == class_id], joined(cells, class_id)
        torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.3, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), own.T.cov(), atol=0.15, rtol=0.05)
        moments = bank.moments(class_id)
        assert moments is not None
        torch.testing.assert_close(moments[0], own.mean(0), atol=0.01, rtol=1e-3)
        torch.testing.assert_close(moments[1], own.var(0), atol=0.01, rtol=0.02)
    assert bank.moments(3) is None


def test_a_draw_of_fixed_size_marks_the_rows_beyond_it() -> None:
    cells = blobs(6000)
    bank, _ = fit(cells, {0: 3, 1: 2, 2: 1})
    amounts = torch.tensor([0.0, 9_000.3, 9_000.6])
    features, ids = bank.draw(amounts, generator(1), 20_000)
    numbers = torch.bincount(ids, minlength=256)
    assert features.shape == (20_000, 6) and numbers.nonzero().flatten().tolist() == [1, 2, 255]
    assert (ids[-1900:] == 255).all() and (numbers[1:3] - amounts[1:]).abs().max() <= 2
    for class_id in (1, 2):
        drawn, own = features[ids == class_id], joined(cells, class_id)
        torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.3, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), own.T.cov(), atol=0.15, rtol=0.05)


def test_far_blobs_get_a_mode_each() -> None:
    bank, _ = fit(blobs(6000), {1: 2})
    first, second = sorted(bank.means[:, 0].tolist())
    assert abs(first) < 1 and abs(second - 20) < 1
    assert bank.weights.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_factors_hold_what_the_diagonal_cannot() -> None:
    own = joined(cells := blobs(6000), 2).T.cov()
    for factors, error in ((0, 0.8), (1, 0.05)):
        bank, _ = fit(cells, {2: 1}, factors)
        part = bank.factors[0].float()
        covariance = torch.diag(bank.deviations[0].float().square()) + part @ part.T
        torch.testing.assert_close(covariance.diagonal(), own.diagonal(), atol=0.02, rtol=0.01)
        assert (abs(float(covariance[0, 1] - own[0, 1])) < 0.1) == (error < 0.1)


@pytest.mark.parametrize("cells", [0, 1, 2, 3])
def test_few_cells(cells: int) -> None:
    features = torch.randn(cells, 4, generator=generator())
    bank, numbers = fit([(features, torch.full((cells,), 2)), (torch.randn(5, 4), torch.zeros(5).long())], {0: 2, 2: 3})
    assert numbers.tolist() == [5, cells]
    drawn, ids = bank.draw(torch.tensor([0.0, 0.0, 50.0]), generator())
    assert drawn.isfinite().all() and (len(ids) > 0) == (cells > 0)
    if cells == 1:
        torch.testing.assert_close(drawn, features.expand_as(drawn), atol=1e-2, rtol=1e-2)


@given(st.lists(st.floats(0, 30), min_size=4, max_size=4), st.integers(0, 99))
def test_the_number_of_draws_is_the_expected_number_rounded(amounts: list[float], seed: int) -> None:
    owners = torch.arange(4, dtype=torch.int32)
    zeros = torch.zeros(4, 3, dtype=torch.float16)
    bank = GaussianBank(torch.zeros(4), owners, torch.ones(4), zeros, zeros, zeros[..., None])
    features, ids = bank.draw(torch.tensor(amounts), generator(seed))
    assert features.shape == (len(ids), 3) and not features.any()
    for class_id, amount in enumerate(amounts):
        assert abs(int((ids == class_id).sum()) - amount) < 1.0001


def test_several_processes_count_as_one() -> None:
    cells, modes = blobs(3000), {0: 1, 1: 2, 2: 1}
    alone, numbers = fit(cells, modes)
    meeting = _Meeting(2)

    def part(rank: int) -> tuple[GaussianBank, Tensor]:
        own = cells[rank::2]
        return fit_mixtures(lambda: own, modes, 2, generator(), meeting.make_all_reduce_sum(rank), rank, 2)

    with ThreadPoolExecutor(2) as pool:
        (one, counts), (other, _) = pool.map(part, range(2))
    assert torch.equal(counts, numbers)
    for name, values in one.state_dict().items():
        assert torch.equal(values, other.state_dict()[name]), name
    # The modes of class 1 may come in another order.
    for class_id in modes:
        rows, mine = alone.owners == class_id, one.owners == class_id
        means, own = alone.means[rows].float(), one.means[mine].float()
        torch.testing.assert_close(own[own[:, 0].argsort()], means[means[:, 0].argsort()], atol=0.02, rtol=0)


def test_replacing_keeps_the_other_classes() -> None:
    old, _ = fit(blobs(900), {0: 2, 1: 2})
    new, _ = fit(blobs(900, seed=1), {0: 1, 2: 3})
    merged = old.replace(new, torch.tensor([1.0, 2.0, 3.0]))
    assert merged.owners.tolist() == [1, 1, 0, 2, 2, 2] and len(merged) == 2
    assert torch.equal(merged.means[:2], old.means[old.owners == 1])
    again = GaussianBank.from_state_dict(merged.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), merged.state_dict().values(), strict=True)
    )
    assert GaussianBank.fits(merged.state_dict()) and not GaussianBank.fits({"counts": torch.zeros(1)})


def test_a_channel_far_from_the_others_does_not_spoil_a_mixture() -> None:
    """An unused logit of a network is -10,000 everywhere, beside features that hardly vary."""
    draw = torch.Generator().manual_seed(0)
    features = 1e-3 * torch.randn(64, 12, generator=draw)
    features[:, 8:] = 1e-7
    features[:, 3] = -1e4
    labels = torch.ones(64, dtype=torch.long)
    bank, _ = fit_mixtures(lambda: [(features, labels)], {1: 8}, 4, draw, lambda x: x)
    for part in (bank.weights, bank.means, bank.deviations, bank.factors):
        assert part.isfinite().all()
