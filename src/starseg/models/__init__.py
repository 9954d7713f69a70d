"""Segmentation network: an encoder, a decoder, and one classifier head per step."""

from starseg.models import foreign as _foreign  # noqa: F401 (registers its builders)
from starseg.models.architectures import Architecture, upgrade_keys
from starseg.models.builders import make_network
from starseg.models.segmenter import Output, Segmenter

__all__ = ["Architecture", "Output", "Segmenter", "make_network", "upgrade_keys"]
