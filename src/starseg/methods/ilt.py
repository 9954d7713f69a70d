"""ILT: LwF and a squared distance between encoder features (Michieli and Zanuttigh, ICCV Workshops 2019)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from starseg.data.samples import Batch
from starseg.losses.reduction import mean
from starseg.methods.lwf import Lwf, LwfOptions
from starseg.methods.protocol import register_method
from starseg.models import Output


class IltOptions(LwfOptions):
    """Options of ILT: those of LwF and the weight of the feature distillation."""

    features: float = Field(100.0, ge=0)
    """Weight of the mean squared difference between the two models' last encoder maps."""


@register_method("ilt")
class Ilt(Lwf):
    """LwF with distillation of the encoder's features."""

    summary = "LwF, and the encoder's features kept near the previous model's"
    base_step = "lwf"
    source = "Michieli and Zanuttigh, ICCVW 2019"
    domains = True
    Options = IltOptions
    options: IltOptions
    maps = True

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Return LwF's losses and, after step 0, the feature distillation."""
        terms = super().terms(batch, output, previous)
        if previous is not None:
            assert output.maps is not None and previous.maps is not None
            change = (output.maps[-1].float() - previous.maps[-1].float()).square()
            terms["features"] = self.options.features * mean(change, self.ctx.all_reduce_sum)
        return terms
