"""Prototypes derived from a classifier: optimality conditions, and the published iterations of AdamW."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.errors import UserError
from starseg.replay.derivation import combine, derive_prototypes, iterate_adamw, minimise, noise_of_prototypes

DECAY, EPSILON = 0.01, 1e-8


def classifier(classes: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(classes, channels, generator=draw) - 0.05, torch.randn(classes, generator=draw) - 1


def gradients(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the published loss, by automatic differentiation."""
    x = x.clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(x @ weight.double().T + bias.double(), torch.eye(len(x)).double())
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize(("classes", "channels"), [(6, 32), (20, 256), (12, 5), (1, 8), (2, 3)])
def test_the_minimiser_is_a_fixed_point_of_adamw(classes: int, channels: int) -> None:
    """AdamW stays where g / (|g| + epsilon) = -decay x, and on the bound x = 0 where g >= 0."""
    weight, bias = classifier(classes, channels)
    x = minimise(weight, bias)
    assert bool((x >= 0).all())
    gradient = gradients(weight, bias, x)
    ratio = gradient / (gradient.abs() + EPSILON)
    assert float((ratio + DECAY * x)[x > 0].abs().max()) < 1e-5
    if (x == 0).any():
        assert float(gradient[x == 0].min()) > -1e-5 * EPSILON


def test_a_class_of_one_channel_each() -> None:
    """With an identity as classifier, a prototype is the channel of its class: no other channel helps it."""
    prototypes = derive_prototypes(4 * torch.eye(5), torch.full((5,), -1.0))
    torch.testing.assert_close(prototypes, torch.eye(5))


def test_the_order_of_classes_and_their_dtype_change_nothing() -> None:
    weight, bias = classifier(7, 16)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    prototypes = derive_prototypes(weight, bias)
    torch.testing.assert_close(derive_prototypes(weight[order], bias[order]), prototypes[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(7))
    assert prototypes.dtype == torch.float32


def test_a_classifier_that_is_not_finite_is_refused() -> None:
    weight, bias = classifier(2, 4)
    weight[1, 2] = math.nan
    with pytest.raises(UserError, match="no finite number"):
        derive_prototypes(weight, bias)


def test_derived_and_seen_prototypes_have_equal_weight() -> None:
    derived = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    seen = torch.tensor([[0.0, 30.0], [0.0, 0.0]])
    torch.testing.assert_close(combine(derived, seen), torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_noise_follows_from_the_nearest_prototype() -> None:
    sixty = math.radians(60)
    prototypes = torch.tensor([[1.0, 0.0], [math.cos(sixty), math.sin(sixty)], [0.0, 1.0]])
    torch.testing.assert_close(noise_of_prototypes(prototypes, "angle"), torch.tensor([30.0, 15.0, 15.0]).deg2rad())
    near = 2 * math.sin(math.radians(15))
    torch.testing.assert_close(noise_of_prototypes(prototypes, "dist"), torch.tensor([1.0, near, near]))
    spread = noise_of_prototypes(prototypes, "bitwise")
    torch.testing.assert_close(spread.norm(dim=1), torch.tensor([1.0, near, near]))
    assert spread.shape == (3, 2)


def test_a_single_class_counts_as_orthogonal_to_another() -> None:
    one = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(noise_of_prototypes(one, "angle"), torch.tensor([math.pi / 4]))
    torch.testing.assert_close(noise_of_prototypes(one, "dist"), torch.tensor([2**0.5]))


def test_the_best_iterate_is_kept() -> None:
    """At x = 0 the gradient of a class points away from its own channel; the first iterates follow it."""
    weight, bias = classifier(3, 6)
    iterated = iterate_adamw(weight, bias, 50)
    expected = (-gradients(weight, bias, torch.zeros(3, 6).double())).clamp_min(0).sign()
    torch.testing.assert_close(iterated, F.normalize(expected, dim=1).float(), atol=0.05, rtol=0)


@pytest.mark.slow
def test_published_iterations_where_the_classes_are_not_separable() -> None:
    """Where the loss has a minimiser, the best of AdamW's iterates converges to it."""
    weight, bias = classifier(24, 4)
    published = iterate_adamw(3 * weight, bias, 50_000)
    torch.testing.assert_close(derive_prototypes(3 * weight, bias), published, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_iterations_of_adamw_to_their_limit_where_the_classes_are_separable() -> None:
    """With the published learning rate, the decay takes 1 / (lr * decay) = 400,000 iterations to act; here 2000."""
    weight, bias = (values.double() for values in classifier(4, 12))
    x = torch.zeros_like(weight, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=0.05, weight_decay=DECAY, eps=EPSILON)
    for _ in range(60_000):
        x.grad = gradients(weight, bias, x.detach())
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0)
    torch.testing.assert_close(
        derive_prototypes(weight, bias).double(), F.normalize(x, dim=1).detach(), atol=1e-3, rtol=0
    )
