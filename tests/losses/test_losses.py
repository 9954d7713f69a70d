"""Properties of the losses by default, where the golden files hold the published choice."""

import pytest
import torch

from engine.waits import Waits
from starseg.bench.run import LossPath, loss_cases
from starseg.losses.star import bce_per_class, mix, negatives_per_class, ocfm, sad


def test_ignored_pixels_leave_the_base_loss_and_its_mean() -> None:
    logits = torch.randn(2, 3, 8, 8)
    labels = torch.randint(0, 8, (2, 8, 8), dtype=torch.uint8)
    ignored = torch.cat([labels, torch.full_like(labels, 255)], 1)
    padded = torch.cat([logits, torch.randn_like(logits)], 2)
    torch.testing.assert_close(bce_per_class(padded, ignored, 5), bce_per_class(logits, labels, 5))
    assert (bce_per_class(padded, ignored, 5, ignored_as_negatives=True) != bce_per_class(logits, labels, 5)).all()


def test_a_batch_of_ignored_pixels_has_zero_loss() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = bce_per_class(logits, torch.full((1, 4, 4), 255), 1).sum()
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


def test_without_replayed_features_replay_has_no_effect() -> None:
    none, count = negatives_per_class(torch.zeros(0, 3))
    assert count == 0
    assert none.tolist() == [0, 0, 0]
    new = torch.rand(3)
    torch.testing.assert_close(mix(new, none, none, count, count), new)


def test_ocfm_of_an_empty_region_is_zero_with_zero_gradients() -> None:
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    loss = ocfm(features, torch.randn(2, 4, 3, 3), torch.zeros(2, 48, 48, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and features.grad.abs().max() == 0


def test_sad_without_new_or_old_classes_is_zero() -> None:
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    background = torch.zeros(1, 32, 32, dtype=torch.uint8)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    assert sad(features, background, 4, 2, prototypes) == 0
    assert sad(features, background, 4, 2, prototypes[:0]) == 0
    assert sad(features, background, 4, 2, prototypes, absent_classes=True, epsilon=1e-12) == 1


def test_sad_gradient_is_bounded_at_a_zero_feature() -> None:
    features = torch.randn(1, 4, 2, 2)
    features[0, :, 0, 0] = 0
    labels = torch.full((1, 32, 32), 4)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    gradients = []
    for epsilon in (1e-3, 1e-12):
        x = features.clone().requires_grad_()
        sad(x, labels, 4, 1, prototypes, epsilon=epsilon).backward()
        gradients.append(x.grad.abs().max())
    assert gradients[0] < 1e4 < gradients[1]


@pytest.mark.parametrize("name", ["voc_15-1", "ade_base"])
def test_an_iteration_of_star_does_not_synchronise_with_the_gpu(name: str) -> None:
    """Except the first of a step, which counts the replayed features."""
    path = LossPath(loss_cases(128)[name])
    path.lean()
    with Waits() as waits:
        path.lean()
    assert waits.found == []
    with waits:
        path.dense()
    assert waits.found, "it is seen where it happens"
