"""Prototypes derived from a linear classifier instead of measured on images (docs/reference/baselines.md, "STAR-Lite").

Shape letters: K classes, D feature channels. A classifier is its weight [K, D] and bias [K].

The prototype of class c is the direction of a nonnegative feature x that the classifier assigns to c and to no other
class: it minimises the mean binary cross-entropy between W x + b and the one-hot vector of c. If the classes are
separable, which is the rule for K < D, this has no minimiser: the loss falls towards 0 while x grows, and its direction
depends on how x grows. The published code iterates AdamW 500,000 times and takes the best iterate. A fixed point of
AdamW with gradient g, decay w and epsilon e satisfies g / (|g| + e) = -w x, so it minimises

    BCE(x) + e * sum_i phi(x_i),   phi(x) = -x - log(1 - w x) / w   on 0 <= x < 1 / w,

which is strictly convex and has exactly one minimiser. :func:`derive_prototypes` solves this problem with a projected
Newton method; :func:`iterate_adamw` performs the published iterations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.errors import UserError
from starseg.replay.directions import Noise

_LR, _DECAY, _EPSILON, _ITERATIONS = 2.5e-4, 0.01, 1e-8, 500_000
# The problem is solved for a sequence of weights of phi, each of them from the solution before.
_FIRST_WEIGHT, _FACTOR, _MOST = 1e-3, 0.1, 200
# Largest gradient at which a solution is accepted, in multiples of the weight of phi; phi' is about 0.1.
_TOLERANCE = 1e-6


def derive_prototypes(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the prototypes that a linear classifier implies, [K, D] float32 unit vectors on the CPU.

    Args:
        weight: [K, D].
        bias: [K].

    Raises:
        UserError: the classifier is not finite.
    """
    return F.normalize(minimise(weight, bias), dim=1).float()


def minimise(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the minimisers of all classes, [K, D] float64 on the CPU; arguments as in :func:`derive_prototypes`.

    The classes are independent problems, which are solved together.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(
            "prototypes cannot be derived from this classifier, which has a weight or bias that is no finite number; "
            "take the network of a step whose training has not diverged"
        )
    problem, x, strength = _Problem(weight, bias), torch.full_like(weight, 1e-3), _FIRST_WEIGHT
    while strength > _EPSILON:
        strength = max(_EPSILON, strength * _FACTOR)
        x = problem.solve(x, strength)
    return x


def iterate_adamw(weight: Tensor, bias: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """Return the prototypes of the published code: the best of many iterations of AdamW, [K, D] unit vectors.

    Its result depends on the dtype: in float32 the gradient of a logit above 17 is 0, so that the iteration ends early.

    Args:
        weight: [K, D].
        bias: [K].
        iterations: number of iterations.
    """
    weight, bias = weight.detach(), bias.detach()
    x = torch.zeros_like(weight, requires_grad=True)
    target = torch.eye(len(weight), dtype=x.dtype, device=x.device)
    optimizer = torch.optim.AdamW([x], lr=_LR, weight_decay=_DECAY, eps=_EPSILON)
    best, found = x.new_full((), torch.inf), torch.zeros_like(weight)
    for _ in range(iterations):
        with torch.enable_grad():
            loss = F.binary_cross_entropy_with_logits(F.linear(x, weight, bias), target)
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0)
            found = torch.where(loss < best, x, found)
            best = torch.minimum(loss.detach(), best)
    return F.normalize(found, dim=1)


def combine(derived: Tensor, seen: Tensor) -> Tensor:
    """Return the unit vectors of the sum of derived prototypes and those of the features seen, [K, D].

    Args:
        derived: [K, D] unit vectors (:func:`derive_prototypes`).
        seen: [K, D] sums of the unit features of each class in the current images; zero for a class without any.
    """
    return F.normalize(derived + F.normalize(seen.to(derived), dim=1), dim=1)


def noise_of_prototypes(prototypes: Tensor, kind: Noise) -> Tensor:
    """Return the noise of replayed directions as the prototypes alone imply it.

    A single class counts as orthogonal to another one.

    Args:
        prototypes: [K, D] unit vectors.
        kind: "angle": half the smallest angle to another prototype; "dist": the smallest distance to another
            prototype; "bitwise": the same distance, spread evenly over the channels.

    Returns:
        [K], for "bitwise" [K, D].
    """
    cosine = prototypes @ prototypes.T
    cosine.fill_diagonal_(-1.0)
    nearest = cosine.amax(1).clamp(-1, 1) if len(prototypes) > 1 else cosine.new_zeros(1)
    if kind == "angle":
        return nearest.acos() / 2
    distance = (2 - 2 * nearest).sqrt()
    if kind == "dist":
        return distance
    return (distance / math.sqrt(prototypes.shape[1]))[:, None].expand_as(prototypes).clone()


class _Problem:
    """The convex problem of :func:`derive_prototypes` for all classes; x is [K, D], one row a class.

    Args:
        weight: [K, D] float64.
        bias: [K] float64.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        # The published loss is the mean over all K x K logits.
        self.scale = 1 / len(weight) ** 2

    def solve(self, x: Tensor, strength: float) -> Tensor:
        """Return the minimisers for a weight of phi, starting from x."""
        x, rows = x.clone(), torch.arange(len(x))
        for _ in range(_MOST):
            gradient = self._gradient(x[rows], rows, strength)
            free = (x[rows] > 0) | (gradient < 0)
            left = (gradient * free).abs().amax(1) > _TOLERANCE * strength
            rows, gradient, free = rows[left], gradient[left], free[left]
            if not len(rows):
                break
            x[rows] = self._search(
                x[rows], rows, gradient, self._direction(x[rows], gradient, free, strength), strength
            )
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def _signs(self, rows: Tensor) -> Tensor:
        """[R, K]: -1 where the class of the row is the target, else 1."""
        return 1 - 2 * F.one_hot(rows, len(self.weight)).double()

    def _objective(self, x: Tensor, rows: Tensor, strength: float) -> Tensor:
        loss = F.softplus(self._signs(rows) * self._logits(x), threshold=700).sum(1)
        return self.scale * loss + strength * (-x - torch.log1p(-_DECAY * x) / _DECAY).sum(1)

    def _gradient(self, x: Tensor, rows: Tensor, strength: float) -> Tensor:
        signs = self._signs(rows)
        slope = signs * torch.sigmoid(signs * self._logits(x))
        return self.scale * slope @ self.weight + strength * _DECAY * x / (1 - _DECAY * x)

    def _direction(self, x: Tensor, gradient: Tensor, free: Tensor, strength: float) -> Tensor:
        """Return the Newton direction in the free coordinates.

        The Hessian is diagonal (of phi) plus a matrix of rank K, so a K x K system is solved instead of a D x D one.
        """
        logits = self._logits(x)
        curvature = self.scale * torch.sigmoid(logits) * torch.sigmoid(-logits)
        root = free * (1 - _DECAY * x) / math.sqrt(strength * _DECAY)  # 1 / sqrt of the diagonal
        factor = curvature.sqrt()[:, :, None] * self.weight * root[:, None, :]
        system = factor @ factor.mT
        system.diagonal(dim1=1, dim2=2).add_(1)
        scaled = (root * gradient)[:, :, None]
        solved = torch.cholesky_solve(factor @ scaled, torch.linalg.cholesky(system))
        return -root * (scaled - factor.mT @ solved)[:, :, 0]

    def _search(self, x: Tensor, rows: Tensor, gradient: Tensor, direction: Tensor, strength: float) -> Tensor:
        """Return the points of a backtracking search along the projected direction."""
        room = torch.where(direction > 0, (1 / _DECAY - x) / direction.clamp_min(1e-300), torch.inf).amin(1)
        size = (0.95 * room).clamp_max(1)[:, None]
        start = self._objective(x, rows, strength)
        for _ in range(40):
            moved = (x + size * direction).clamp_min(0)
            allowed = start + 1e-4 * (gradient * (moved - x)).sum(1) + 1e-14 * start.abs()
            worse = self._objective(moved, rows, strength) > allowed
            if not worse.any():
                break
            size = torch.where(worse[:, None], size / 2, size)
        return moved
