"""Loss functions: pure functions of tensors, whose means are taken over all processes."""

from starseg.losses.reduction import AllReduceSum, identity, mean, ratio
from starseg.losses.star import bce_per_class, negatives_per_class, one_hot, upsample
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

__all__ = ["AllReduceSum", "bce_per_class", "identity", "mean", "negatives_per_class", "one_hot", "ratio", "upsample"]
