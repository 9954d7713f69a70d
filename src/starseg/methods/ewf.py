"""EWF: the weights of two models are fused after each step of MiB or PLOP (Xiao et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from starseg.config import Choices
from starseg.data.samples import Batch
from starseg.methods.mib import Mib, MibOptions
from starseg.methods.plop import Plop, PlopOptions
from starseg.methods.protocol import Group, Network, StepContext, register_method
from starseg.methods.recipes import Recipes
from starseg.methods.softmax import SoftmaxMethod
from starseg.models import Segmenter


class EwfOptions(MibOptions, PlopOptions):
    """Options of EWF: the base method, and the options of MiB and of PLOP, of which those of the base method apply."""

    base: Literal["mib", "plop"] = "mib"
    """Method whose losses train each step."""


def fusion_share(new_classes: int, old_classes: int) -> float:
    """Return eta, the share of the new weights: the square root of the share of the new classes."""
    return float((new_classes / (new_classes + old_classes)) ** 0.5)


@torch.no_grad()
def fuse_weights(model: Segmenter, old_model: Segmenter, share: float) -> None:
    """Replace every weight that both models have by (1 - share) old + share new; heads of new classes stay.

    The running statistics of batch norm are fused like weights.
    """
    old = old_model.state_dict()
    for name, value in model.state_dict().items():
        if name in old and value.is_floating_point():
            value.copy_(torch.lerp(old[name], value, share))


@register_method("ewf")
class Ewf(SoftmaxMethod):
    """MiB or PLOP, with the weights of the previous and of the new model averaged after each later step."""

    summary = "MiB or PLOP; after each step the weights of the previous and the new model are averaged"
    base_step = "lwf"
    source = "Xiao et al., CVPR 2023"
    recipes: ClassVar[Recipes] = {key: replace(recipe, tasks={}) for key, recipe in Plop.recipes.items()}
    Options = EwfOptions
    options: EwfOptions

    def __init__(self, options: EwfOptions) -> None:
        super().__init__(options)
        values = options.model_dump()
        base, fields = (Mib, MibOptions) if options.base == "mib" else (Plop, PlopOptions)
        self.base: Mib | Plop = base(fields(**{name: values[name] for name in fields.model_fields}))

    def init_heads(self, ctx: StepContext) -> None:
        """Initialise the new head as the base method does."""
        self.base.init_heads(ctx)

    def freeze(self, ctx: StepContext) -> None:
        """Freeze what the base method freezes."""
        self.base.freeze(ctx)

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return the groups of the base method."""
        return self.base.param_groups(ctx)

    def begin_step(self, ctx: StepContext) -> None:
        """Prepare the step as the base method does."""
        super().begin_step(ctx)
        self.base.begin_step(ctx)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the losses of the base method."""
        return self.base.losses(batch, new, old)

    def end_step(self, ctx: StepContext) -> None:
        """Fuse the weights of the previous and of the new model after a later step."""
        self.base.end_step(ctx)
        if ctx.old_model is not None:
            fuse_weights(ctx.model, ctx.old_model, fusion_share(ctx.new_classes, ctx.old_classes))

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the prediction rule of the base method."""
        return self.base.rule(choices)
