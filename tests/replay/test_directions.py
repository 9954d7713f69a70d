"""The bank of STAR-Basic and STAR-Lite: draws, noise and replay plan."""

import math

import pytest
import torch
import torch.nn.functional as F

from starseg.replay.directions import DirectionBank, rotate
from starseg.replay.plan import make_basic_plan, make_plan
from starseg.replay.statistics import measure, square_angles

DRAWS = 40_000


def _bank(noise: torch.Tensor, channels: int = 32) -> DirectionBank:
    prototypes = F.normalize(torch.rand(2, channels, generator=torch.Generator().manual_seed(1)), dim=1)
    return DirectionBank(torch.ones(3), prototypes, noise)


def _angles(bank: DirectionBank, row: int, kind: str) -> torch.Tensor:
    rows = torch.full((DRAWS,), row)
    drawn = bank.draw(rows, torch.Generator().manual_seed(0), kind)  # type: ignore[arg-type]
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(DRAWS))
    return (drawn @ bank.prototypes[row]).clamp(-1, 1).acos()


def test_angles_are_half_normal() -> None:
    bank = _bank(torch.tensor([0.1, 0.3]))
    for row, sigma in enumerate((0.1, 0.3)):
        assert float(_angles(bank, row, "angle").square().mean().sqrt()) == pytest.approx(sigma, rel=0.02)


def test_distances_have_the_mean_noise_of_the_present_classes() -> None:
    bank = _bank(torch.tensor([0.1, 0.3]))
    for row in (0, 1):
        distances = 2 * (_angles(bank, row, "dist") / 2).sin()
        assert float(distances.square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    absent = DirectionBank(torch.ones(3), bank.prototypes * torch.tensor([[1.0], [0.0]]), torch.tensor([0.1, 0.0]))
    distances = 2 * (_angles(absent, 0, "dist") / 2).sin()
    assert float(distances.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_noise_per_channel() -> None:
    bank = _bank(torch.zeros(2, 32).index_fill(1, torch.tensor([3]), 0.1))
    drawn = bank.draw(torch.zeros(DRAWS, dtype=torch.int64), torch.Generator().manual_seed(0), "bitwise")
    across = drawn / drawn[:, :1] * bank.prototypes[0, 0] - bank.prototypes[0]
    assert float(across[:, 3].std()) == pytest.approx(0.1, rel=0.02)
    assert float(across[:, torch.arange(32) != 3].abs().max()) < 1e-5


def test_a_rotation_has_its_angle() -> None:
    prototypes, side = F.normalize(torch.randn(50, 8), dim=1), torch.randn(50, 8)
    theta = torch.linspace(0, 1.5, 50)
    turned = rotate(prototypes, side, theta)
    torch.testing.assert_close((turned * prototypes).sum(1).clamp(-1, 1).acos(), theta, atol=1e-3, rtol=0)
    obtuse = rotate(prototypes, side, torch.full((50,), math.radians(120)))
    torch.testing.assert_close((obtuse * prototypes).sum(1), torch.full((50,), 0.5))


def test_the_plan_is_the_same_in_either_setting() -> None:
    stored, predicted = torch.tensor([1000.0, 95.0, 7.0]), torch.tensor([400.0, 30.0, 0.0])
    plan = make_basic_plan(stored, predicted, 10)
    assert plan.per_iteration.tolist() == [9, 0]
    assert plan.background_ratio == 2.5
    assert plan.carried.tolist() == [1400, 95, 7]
    assert make_plan("disjoint", stored, predicted, 3, 10).background_ratio == plan.background_ratio


def test_square_angles_equal_the_formula() -> None:
    features, labels = torch.randn(3, 6, 4, 4), torch.tensor([0, 4, 5])[torch.randint(0, 3, (3, 4, 4))]
    labels[0, 0, 0] = 255
    cells = [(features[:2], labels[:2]), (features[2:], labels[2:])]
    bank = measure(cells, 4, 2).finish()
    total = square_angles(cells, 4, bank.prototypes)
    for k in (0, 1):
        unit = F.normalize(features.movedim(1, -1)[labels == 4 + k].double(), dim=1)
        expected = (unit @ bank.prototypes[k].double()).acos().square().sum()
        torch.testing.assert_close(total[k], expected)
