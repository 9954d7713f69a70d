"""The bank of STAR-Basic and STAR-Lite: prototypes and their noise as directions, without feature norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.replay.bank import ClassBank

Noise = Literal["dist", "angle", "bitwise"]

_LARGEST_DISTANCE = 1.999


@dataclass(frozen=True)
class DirectionBank(ClassBank):
    """Prototypes and noise; which kind of noise it is, the method's options say.

    Attributes:
        noise: root mean square over the unit features of a class: of the distance to the prototype ("dist", [K]), of
            the angle to it ("angle", [K] radians), or of the deviation in each channel ("bitwise", [K, D]).
    """

    noise: Tensor

    def draw(self, rows: Tensor, generator: torch.Generator, kind: Noise) -> Tensor:
        """Draw unit vectors around prototypes (docs/reference/baselines.md, "STAR-Basic").

        Args:
            rows: [M] int64, row of each vector's class.
            generator: on the bank's device.
            kind: kind of the bank's noise.

        Returns:
            [M, D].
        """
        prototypes, device = self.prototypes[rows], self.prototypes.device
        if kind == "bitwise":
            e = torch.randn(prototypes.shape, generator=generator, device=device)
            return F.normalize(prototypes + self.noise[rows] * e, dim=1)
        e = torch.randn(len(rows), generator=generator, device=device)
        if kind == "dist":
            mean = self.noise.sum() / self.present.sum().clamp_min(1)
            theta = 2 * torch.asin((mean * e).abs().clamp_max(_LARGEST_DISTANCE) / 2)
            side = torch.rand(prototypes.shape, generator=generator, device=device) - 0.5
        else:
            theta = (self.noise[rows] * e).abs()
            side = torch.randn(prototypes.shape, generator=generator, device=device)
        return rotate(prototypes, side, theta)


def rotate(prototypes: Tensor, side: Tensor, theta: Tensor) -> Tensor:
    """Return normalise(P + tan(theta) v), with v the part of ``side`` orthogonal to P, normalised.

    Args:
        prototypes: [M, D] unit vectors P.
        side: [M, D] vectors, each not parallel to its prototype.
        theta: [M] radians.

    Returns:
        [M, D] unit vectors at the angle theta to P, or pi - theta where theta exceeds pi / 2.
    """
    across = F.normalize(side - (side * prototypes).sum(1, keepdim=True) * prototypes, dim=1)
    return F.normalize(prototypes + theta.tan()[:, None] * across, dim=1)
