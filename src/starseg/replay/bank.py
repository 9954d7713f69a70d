"""Banks: what is stored of the old classes' images. STAR's prototype bank is :class:`PrototypeBank`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from starseg.replay.record import TensorRecord

Norms = Literal["channel", "vector"]


B = TypeVar("B", bound="ClassBank")


@dataclass(frozen=True)
class ClassBank(TensorRecord):
    """Tensors of every class seen so far, for K classes and D feature channels, all float32.

    Attributes:
        counts: [1 + K] grid cells of the background and of each class.
        prototypes: [K, D] unit prototypes.
    """

    counts: Tensor
    prototypes: Tensor

    def __len__(self) -> int:
        return len(self.prototypes)

    @property
    def present(self) -> Tensor:
        """[K] bool: classes with at least one cell; the others are not replayed and take no part in SAD."""
        return self.prototypes.abs().sum(1) > 0

    @cached_property
    def shown(self) -> Tensor:
        """[P, D] prototypes of the :attr:`present` classes.

        Cached, because counting these classes synchronises with the GPU.
        """
        return self.prototypes[self.present]

    def extend(self: B, new: B, counts: Tensor) -> B:
        """Return a bank of the old classes followed by the new ones.

        Args:
            new: bank of the new classes.
            counts: [1 + K_old] counts of the background and of the old classes, which replace the stored ones.
        """
        merged: dict[str, Any] = {
            f.name: torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self) if f.name != "counts"
        }
        return type(self)(counts=torch.cat([counts, new.counts[1:]]), **merged)


@dataclass(frozen=True)
class PrototypeBank(ClassBank):
    """The bank of STAR (Chen et al., NeurIPS 2023).

    Attributes:
        noise: [K, D] root mean square deviation of the unit features from their prototype.
        norm_mean: [K] mean feature norm.
        norm_std: [K] unbiased standard deviation of the feature norm, 0 for a class with one cell.
    """

    noise: Tensor
    norm_mean: Tensor
    norm_std: Tensor

    def draw(self, rows: Tensor, generator: torch.Generator, norms: Norms = "channel") -> Tensor:
        """Draw replayed features (P + s e1) * (m + d e2), with e1 and e2 standard normal.

        Args:
            rows: [M] int64, row of each feature's class.
            generator: on the bank's device.
            norms: draw e2 once per channel (as the published tables were made) or once per feature vector.

        Returns:
            [M, D].
        """
        shape = (len(rows), self.prototypes.shape[1])
        device = self.prototypes.device
        e1 = torch.randn(shape, generator=generator, device=device)
        e2 = torch.randn(shape if norms == "channel" else (len(rows), 1), generator=generator, device=device)
        return self.features(rows, e1, e2)

    def features(self, rows: Tensor, e1: Tensor, e2: Tensor) -> Tensor:
        """Return features of the classes in ``rows`` [M], from given draws e1 [M, D] and e2 [M, D] or [M, 1]."""
        directions = self.prototypes[rows] + self.noise[rows] * e1
        return directions * (self.norm_mean[rows, None] + self.norm_std[rows, None] * e2)
