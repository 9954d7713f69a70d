"""Ridge regression from sufficient statistics equals the joint solution and the published recursive inverse."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.replay.ridge import RidgeStatistics

FEATURES, GAMMA = 24, 0.5


def _cells(classes: int, cells: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(cells, FEATURES, generator=draw, dtype=torch.float64).relu()
    return features, torch.randint(0, 1 + classes, (cells,), generator=draw)


def _joint(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Solve the augmented least-squares problem, without normal equations."""
    rows = torch.cat([features, GAMMA**0.5 * torch.eye(FEATURES, dtype=torch.float64)])
    targets = F.pad(F.one_hot(labels, 1 + classes).double(), (0, 0, 0, FEATURES))
    return torch.linalg.lstsq(rows, targets).solution


def _steps() -> list[tuple[int, Tensor, Tensor]]:
    """Three steps: the number of classes after the step, features and labels."""
    return [(classes, *_cells(classes, cells, classes)) for classes, cells in ((3, 200), (5, 90), (6, 40))]


def _in_steps() -> Tensor:
    statistics = RidgeStatistics.zeros(FEATURES, 0)
    for classes, features, labels in _steps():
        statistics = statistics.extend(classes - statistics.classes)
        for part, ids in zip(features.split(37), labels.split(37), strict=True):
            statistics.update(part, ids)
    return statistics.solve(GAMMA)


def test_steps_equal_the_joint_solution() -> None:
    features = torch.cat([features for _, features, _ in _steps()])
    labels = torch.cat([labels for _, _, labels in _steps()])
    torch.testing.assert_close(_in_steps(), _joint(features, labels, 6), atol=1e-8, rtol=1e-8)


def test_steps_equal_the_recursive_inverse() -> None:
    """K = (I + Phi S Phi^T)^-1; S <- S - S Phi^T K Phi S; W <- W + S Phi^T (Y - Phi W), batch by batch."""
    inverse = torch.eye(FEATURES, dtype=torch.float64) / GAMMA
    weight = torch.zeros(FEATURES, 1, dtype=torch.float64)
    for classes, features, labels in _steps():
        weight = F.pad(weight, (0, 1 + classes - weight.shape[1]))
        for phi, ids in zip(features.split(16), labels.split(16), strict=True):
            kernel = torch.linalg.inv(torch.eye(len(phi), dtype=torch.float64) + phi @ inverse @ phi.T)
            inverse = inverse - inverse @ phi.T @ kernel @ phi @ inverse
            weight = weight + inverse @ phi.T @ (F.one_hot(ids, 1 + classes) - phi @ weight)
    torch.testing.assert_close(_in_steps(), weight, atol=1e-8, rtol=1e-8)


def test_ignored_cells_are_left_out() -> None:
    features, labels = _cells(3, 50, 0)
    labels[::3] = 255
    some, all_ = RidgeStatistics.zeros(FEATURES, 3), RidgeStatistics.zeros(FEATURES, 3)
    some.update(features[labels != 255], labels[labels != 255])
    all_.update(features, labels)
    for a, b in zip(some.state_dict().values(), all_.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_sums_of_processes_are_merged() -> None:
    features, labels = _cells(3, 60, 0)
    whole, earlier = RidgeStatistics.zeros(FEATURES, 3), RidgeStatistics.zeros(FEATURES, 3)
    whole.update(features, labels)
    shares = [RidgeStatistics.zeros(FEATURES, 3) for _ in range(2)]
    for rank, share in enumerate(shares):
        share.update(features[rank::2], labels[rank::2])
    others = iter(shares[1].state_dict().values())
    earlier.merge(shares[0], lambda values: values + next(others))
    for a, b in zip(whole.state_dict().values(), earlier.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cells", [3, 5000])
def test_few_and_many_cells_have_a_solution(cells: int) -> None:
    features, labels = _cells(2, cells, 1)
    statistics = RidgeStatistics.zeros(FEATURES, 2)
    statistics.update(features.float(), labels.to(torch.uint8))
    again = RidgeStatistics.from_state_dict(statistics.state_dict())
    torch.testing.assert_close(again.solve(GAMMA), _joint(features, labels, 2), atol=1e-5, rtol=1e-4)
