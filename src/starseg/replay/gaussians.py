"""Mixtures of Gaussians of each class's features, from which constellation replays (docs/constellation.md).

Shape letters: K classes without the background, M modes of all classes, D feature channels, R factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from starseg.replay.record import TensorRecord
from starseg.tasks import IGNORE

RESERVOIR = 4096
"""Cells of a class on which the modes are clustered."""
_ROUNDS, _FACTOR_ROUNDS = 20, 5
# The covariance of a mode is averaged with the diagonal covariance of its class, which counts as so many cells.
_PRIOR_CELLS = 8.0
Cells = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over features [n, D] and their training ids [n]; every pass gives the same."""


@dataclass(frozen=True)
class GaussianBank(TensorRecord):
    """A mixture of Gaussians for the background and for each class, each mode N(mean, diag(deviation^2) + F F^T).

    Attributes:
        counts: [1 + K] float32 cells of the background and of each class.
        owners: [M] int32 training id of each mode.
        weights: [M] float32 share of each mode in the cells of its class.
        means, deviations: [M, D] float16.
        factors: [M, D, R] float16.
    """

    counts: Tensor
    owners: Tensor
    weights: Tensor
    means: Tensor
    deviations: Tensor
    factors: Tensor

    def __len__(self) -> int:
        return len(self.counts) - 1

    def draw(self, amounts: Tensor, generator: torch.Generator, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw features.

        Args:
            amounts: [1 + K] float, expected number of features of the background and of each class.
            generator: on the bank's device.
            size: number of rows to return, at least the sum of ``amounts`` plus the number of modes; by default as many
                as features are drawn. That number is random, so that without ``size`` the draw waits for a GPU.

        Returns:
            Features [n, D] float32 and their training ids [n] int64, 255 in rows beyond the features drawn. The number
            of features of each mode is its expected number, rounded up or down at random.
        """
        device = self.means.device
        expected = amounts[self.owners.long()] * self.weights
        numbers = (expected + torch.rand(len(expected), generator=generator, device=device)).floor().long()
        total = numbers.sum()
        places = torch.arange(int(total) if size is None else size, device=device)
        rows = torch.searchsorted(numbers.cumsum(0), places, right=True).clamp_max(len(numbers) - 1)
        means, deviations, factors = self._single
        noise = torch.randn(len(rows), means.shape[1], generator=generator, device=device)
        features = means.index_select(0, rows).addcmul_(deviations.index_select(0, rows), noise)
        common = torch.randn(len(rows), len(factors), generator=generator, device=device)
        for factor, scores in zip(factors, common.T, strict=True):
            features.addcmul_(factor.index_select(0, rows), scores[:, None])
        return features, torch.where(places < total, self.owners[rows].long(), IGNORE)

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means [M, D], deviations [M, D] and factors [R, M, D] in single precision."""
        factors = self.factors.movedim(2, 0).float()
        return self.means.float(), self.deviations.float(), factors.contiguous()

    def moments(self, class_id: int) -> tuple[Tensor, Tensor] | None:
        """Return the mean [D] and the variance [D] of the features of a class, float32; None if it has no modes."""
        own = self.owners == class_id
        if not own.any():
            return None
        weights, means = self.weights[own], self.means[own].float()
        mean = weights @ means
        variance = self.deviations[own].float().square() + self.factors[own].float().square().sum(2)
        return mean, weights @ (variance + (means - mean).square())

    def replace(self, new: GaussianBank, counts: Tensor) -> GaussianBank:
        """Return a bank with the modes of ``new`` in place of those of the same classes.

        Args:
            new: bank whose classes are named by its owners; its counts are ignored.
            counts: [1 + K'] counts of all classes of the result.
        """
        kept = ~torch.isin(self.owners, new.owners)
        merged = {
            f.name: torch.cat([getattr(self, f.name)[kept], getattr(new, f.name)])
            for f in fields(self)
            if f.name != "counts"
        }
        return GaussianBank(counts=counts.float(), **merged)


def fit_mixtures(
    cells: Cells,
    modes: Mapping[int, int],
    factors: int,
    generator: torch.Generator,
    all_reduce_sum: Callable[[Tensor], Tensor],
    rank: int = 0,
    world: int = 1,
) -> tuple[GaussianBank, Tensor]:
    """Fit mixtures in two passes: k-means on a sample of each class, then the moments of each mode in float64.

    Args:
        cells: features and training ids of this process, at least one batch.
        modes: number of modes by training id; other ids are left out. A mode without a cell is dropped.
        factors: R.
        generator: on the device of the features, in the same state in every process.
        all_reduce_sum: sums a tensor over processes.
        rank: index of this process.
        world: number of processes.

    Returns:
        A bank of the classes in ``modes``, and [len(modes)] float64 number of cells of each. The bank's counts are
        empty.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device)) + rank
    samples = _sample(cells, list(modes), RESERVOIR // world, torch.Generator(generator.device).manual_seed(seed))
    whole = [_gather(part, RESERVOIR // world, all_reduce_sum, rank, world) for part in samples]
    centres = [_cluster(part, k, generator) for part, k in zip(whole, modes.values(), strict=True)]
    moments = [_Moments.zeros(centre) for centre in centres]
    for features, labels in cells():
        for class_id, moment in zip(modes, moments, strict=True):
            moment.update(features.index_select(0, (labels == class_id).nonzero()[:, 0]))
    parts, counts = [], []
    for class_id, moment in zip(modes, moments, strict=True):
        moment = moment.reduce(all_reduce_sum)
        counts.append(moment.number.sum())
        parts.append(moment.finish(class_id, factors))
    columns = zip(*parts, strict=True)
    names = ("owners", "weights", "means", "deviations", "factors")
    fitted = {name: torch.cat(column) for name, column in zip(names, columns, strict=True)}
    return GaussianBank(counts=torch.zeros(0), **fitted), torch.stack(counts)


def _sample(cells: Cells, ids: list[int], size: int, draw: torch.Generator) -> list[Tensor]:
    """Draw up to ``size`` cells of each class uniformly from one pass: those with the smallest random keys."""
    kept = [_Reservoir(size) for _ in ids]
    for features, labels in cells():
        keys = torch.rand(len(labels), generator=draw, device=features.device)
        for reservoir, class_id in zip(kept, ids, strict=True):
            reservoir.add(features, keys, labels == class_id)
    return [reservoir.values() for reservoir in kept]


@dataclass
class _Reservoir:
    """The ``size`` features with the smallest keys; more are held in between, so that few are copied often."""

    size: int
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: int = 0
    limit: Tensor | None = None

    def add(self, features: Tensor, keys: Tensor, own: Tensor) -> None:
        """Add those of the features [n, D] with keys [n] that the mask [n] chooses."""
        if self.limit is not None:
            own = own & (keys < self.limit)
        rows = own.nonzero()[:, 0]
        self.parts.append((features.index_select(0, rows), keys[rows]))
        self.held += len(rows)
        if self.held > 2 * self.size:
            self.parts = [self._least()]
            self.held, self.limit = self.size, self.parts[0][1][-1]

    def values(self) -> Tensor:
        """Return the features, by ascending key."""
        return self._least()[0]

    def _least(self) -> tuple[Tensor, Tensor]:
        values, keys = (torch.cat(part) for part in zip(*self.parts, strict=True))
        least = keys.argsort()[: self.size]
        return values.index_select(0, least), keys[least]


def _gather(part: Tensor, size: int, all_reduce_sum: Callable[[Tensor], Tensor], rank: int, world: int) -> Tensor:
    """Concatenate the samples [n, D], n at most ``size``, of all processes."""
    if world == 1:
        return part
    numbers = all_reduce_sum(torch.nn.functional.one_hot(torch.tensor(rank, device=part.device), world) * len(part))
    room = part.new_zeros(world, size, part.shape[1])
    room[rank, : len(part)] = part
    return torch.cat([own[:n] for own, n in zip(all_reduce_sum(room), numbers.tolist(), strict=True)])


def _cluster(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return up to ``k`` centres [k', D] of points [n, D] by k-means, begun with k-means++."""
    if not len(points):
        return points.new_zeros(1, points.shape[1])
    centres = points[:1]
    for _ in range(min(k, len(points)) - 1):
        distance = torch.cdist(points, centres).amin(1).square()
        if not float(distance.sum()):
            break
        chosen = torch.multinomial(distance, 1, generator=generator)
        centres = torch.cat([centres, points[chosen]])
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        number = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(number > 0, sums / number.clamp_min(1), centres)
    return centres


@dataclass
class _Moments:
    """Moments of the cells nearest to each of k centres: number [k], sum [k, D], products [k, D, D], in float64."""

    centres: Tensor
    number: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def zeros(cls, centres: Tensor) -> _Moments:
        k, channels = centres.shape
        zeros = centres.new_zeros(k, channels, channels, dtype=torch.float64)
        return cls(centres, zeros[:, 0, 0].clone(), zeros[:, 0].clone(), zeros)

    def update(self, features: Tensor) -> None:
        if not len(features):
            return
        nearest = torch.cdist(features, self.centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=len(self.centres)).tolist()
        parts = features.index_select(0, nearest.argsort(stable=True)).split(sizes)
        for mode, (part, centre) in enumerate(zip(parts, self.centres, strict=True)):
            own = part - centre
            self.number[mode] += len(own)
            self.total[mode] += own.sum(0).double()
            self.products[mode] += (own.T @ own).double()

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> _Moments:
        return _Moments(self.centres, *(all_reduce_sum(v) for v in (self.number, self.total, self.products)))

    def finish(self, class_id: int, factors: int) -> tuple[Tensor, ...]:
        """Return owners, weights, means, deviations and factors of the modes that have cells."""
        shown = self.number > 0
        number, centres = self.number[shown], self.centres[shown].double()
        shift = self.total[shown] / number[:, None]
        means = centres + shift
        covariance = self.products[shown] / number[:, None, None] - shift[:, :, None] * shift[:, None, :]
        weights = number / number.sum().clamp_min(1)
        mean = weights @ means
        spread = weights @ (covariance.diagonal(dim1=1, dim2=2) + (means - mean).square())
        trust = (number / (number + _PRIOR_CELLS))[:, None, None]
        covariance = trust * covariance + (1 - trust) * torch.diag_embed(spread)
        parts = [_factorise(matrix, factors) for matrix in covariance]
        deviations = torch.stack([rest for rest, _ in parts]) if parts else means
        common = torch.stack([part for _, part in parts]) if parts else means.new_zeros(*means.shape, factors)
        owners = torch.full((len(number),), class_id, dtype=torch.int32, device=number.device)
        return owners, weights.float(), means.half(), deviations.half(), common.half()


def _factorise(covariance: Tensor, factors: int) -> tuple[Tensor, Tensor]:
    """Return deviations [D] and factors F [D, R] with covariance ~ diag(deviations^2) + F F^T, by factor analysis.

    A few steps of the fixed-point iteration of maximum likelihood (Joereskog, Psychometrika 1967).
    """
    variance = covariance.diagonal()
    least = 1e-3 * variance.clamp_min(1e-3 * float(variance.mean()) + 1e-12)
    rest, common = variance.maximum(least), covariance.new_zeros(len(variance), factors)
    top = min(factors, len(variance))
    for _ in range(_FACTOR_ROUNDS if top else 0):
        scale = rest.sqrt()
        values, vectors = torch.linalg.eigh(covariance / scale[:, None] / scale)
        common[:, :top] = scale[:, None] * vectors[:, -top:] * (values[-top:] - 1).clamp_min(0).sqrt()
        rest = (variance - common.square().sum(1)).maximum(least)
    return rest.sqrt(), common
