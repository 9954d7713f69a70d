"""The segmentation network: timm backbone, ASPP, one head a step."""

from starseg.models.segmenter import Output, Segmenter

__all__ = ["Output", "Segmenter"]
