"""A network of one's own and the function that builds it, as a user's file that STARSEG_MODELS names."""

import torch
from torch import Tensor, nn

import starseg


class TwoBranches(nn.Module):
    """A small network whose classifier lies two levels deep."""

    def __init__(self, outputs: int, width: int = 8, kernel: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.decode_head = nn.ModuleDict(
            {
                "linear_fuse": nn.Conv2d(2 * width, width, 1),
                "classifier": nn.Conv2d(width, outputs, kernel, padding=kernel // 2),
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images)
        deep = nn.functional.interpolate(self.deep(fine), fine.shape[-2:], mode="bilinear")
        fused = self.decode_head["linear_fuse"](torch.cat([fine, deep], 1))
        return {"logits": self.decode_head["classifier"](fused.relu())}


@starseg.register_model("two_branches")
def two_branches(outputs: int, width: int = 8, kernel: int = 1) -> nn.Module:
    return TwoBranches(outputs, width, kernel)
