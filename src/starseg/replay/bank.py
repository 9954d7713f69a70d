"""Prototype bank: all that is stored of the old classes (Chen et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Norms = Literal["channel", "vector"]


@dataclass(frozen=True)
class PrototypeBank:
    """Statistics of every class seen so far, K classes, D feature channels, all float32.

    Attributes:
        counts: [1 + K] grid cells of the background and of each class.
        prototypes: [K, D] unit prototypes.
        noise: [K, D] root mean square deviation of the unit features from their prototype.
        norm_mean: [K] mean feature norm.
        norm_std: [K] unbiased standard deviation of the feature norm, 0 for a class with one cell.
    """

    counts: Tensor
    prototypes: Tensor
    noise: Tensor
    norm_mean: Tensor
    norm_std: Tensor

    def __len__(self) -> int:
        return len(self.prototypes)

    @property
    def nbytes(self) -> int:
        """Size of the stored numbers in bytes."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def present(self) -> Tensor:
        """Classes that had a cell, [K] bool; the others are not used in replay or losses."""
        return self.prototypes.abs().sum(1) > 0

    @cached_property
    def shown(self) -> Tensor:
        """Prototypes [P, D] of the classes :attr:`present`; the first access synchronises with the GPU."""
        return self.prototypes[self.present]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, as in bank.safetensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether named tensors are those of a bank."""
        return all(f.name in state for f in fields(cls))

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> PrototypeBank:
        """Create a bank from copies of the tensors that :meth:`state_dict` returned."""
        return cls(**{f.name: state[f.name].clone() for f in fields(cls)})

    def to(self, device: torch.device) -> PrototypeBank:
        """Return the bank on a device."""
        return PrototypeBank(**{k: v.to(device) for k, v in self.state_dict().items()})

    def extend(self, new: PrototypeBank, counts: Tensor) -> PrototypeBank:
        """Append the new classes; the old ones get ``counts`` [1 + K_old]."""
        merged = {
            f.name: torch.cat([getattr(self, f.name), getattr(new, f.name)]) for f in fields(self) if f.name != "counts"
        }
        return PrototypeBank(counts=torch.cat([counts, new.counts[1:]]), **merged)

    def draw(self, rows: Tensor, generator: torch.Generator, norms: Norms = "channel") -> Tensor:
        """Draw replayed features: (P + s e1) * (m + d e2), e1 and e2 standard normal.

        Args:
            rows: [M] int64, the class of each.
            generator: on the bank's device.
            norms: draw e2 per channel (as the published tables were made) or once per vector.

        Returns:
            [M, D].
        """
        shape = (len(rows), self.prototypes.shape[1])
        device = self.prototypes.device
        e1 = torch.randn(shape, generator=generator, device=device)
        e2 = torch.randn(shape if norms == "channel" else (len(rows), 1), generator=generator, device=device)
        return self.features(rows, e1, e2)

    def features(self, rows: Tensor, e1: Tensor, e2: Tensor) -> Tensor:
        """Return features of classes ``rows`` [M] for given draws e1 [M, D], e2 [M, D] or [M, 1]."""
        directions = self.prototypes[rows] + self.noise[rows] * e1
        return directions * (self.norm_mean[rows, None] + self.norm_std[rows, None] * e2)
