"""Mix Transformers, the encoders of SegFormer (Xie et al., NeurIPS 2021): timm models ``mit_b0`` to ``mit_b5``.

A Mix Transformer has four stages with strides 4, 8, 16 and 32. Each consists of an overlapping patch embedding (a
convolution of 7 x 7 or 3 x 3 and a layer norm), blocks of attention and Mix-FFN, and a layer norm. The keys and values
of the attention are computed at stride 32, from a strided convolution; Mix-FFN has a 3 x 3 depthwise convolution
between its two linear layers in place of position embeddings. PVTv2, which timm has, is built from the same layers;
only the hidden layers of its first two stages are wider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor

_NARROW, _WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
_SIZES = {
    "mit_b0": (_NARROW, (2, 2, 2, 2)),
    "mit_b1": (_WIDE, (2, 2, 2, 2)),
    "mit_b2": (_WIDE, (3, 4, 6, 3)),
    "mit_b3": (_WIDE, (3, 4, 18, 3)),
    "mit_b4": (_WIDE, (3, 8, 27, 3)),
    "mit_b5": (_WIDE, (3, 6, 40, 3)),
}
"""Channels and number of blocks of each stage."""
_EXPANSION, _DROP_PATH = 4, 0.1
# A parameter's name in the published weight files: part, stage and the rest; and the parts' names in timm.
_PUBLISHED = re.compile(r"(patch_embed|block|norm)([1-4])\.(.+)")
_PARTS = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
default_cfgs = generate_default_cfgs(
    {name: {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "num_classes": 1000} for name in _SIZES}
)


def _register(name: str) -> None:
    """Register a size with timm, which reads the name, module and configuration from the function."""
    channels, depths = _SIZES[name]

    def create(pretrained: bool = False, **options: Any) -> PyramidVisionTransformerV2:
        sizes = {"embed_dims": channels, "depths": depths, "mlp_ratios": _EXPANSION, "num_heads": (1, 2, 5, 8)}
        given = {**sizes, "drop_path_rate": _DROP_PATH, **options}
        features = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}
        return build_model_with_cfg(PyramidVisionTransformerV2, name, pretrained, feature_cfg=features, **given)

    create.__name__ = name
    register_model(create)


for _name in _SIZES:
    _register(_name)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters in a published file (``mit_b2.pth``) as timm's feature extractors name them.

    Other names do not change.
    """
    return {_timm_name(name): value for name, value in state.items()}


def _timm_name(name: str) -> str:
    found = _PUBLISHED.fullmatch(name)
    if found is None:
        return name
    part, stage, rest = found.groups()
    rest = rest.replace("dwconv.dwconv.", "dwconv.")
    first = part == "patch_embed" and stage == "1"
    return f"patch_embed.{rest}" if first else f"stages_{int(stage) - 1}.{_PARTS[part]}.{rest}"
