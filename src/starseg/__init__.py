"""starseg: class-incremental semantic segmentation by prototype replay (STAR, NeurIPS 2023)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from starseg.utils import deprecation

if TYPE_CHECKING:
    from starseg.adoption.api import adopt
    from starseg.config import load_config
    from starseg.experiments.train import train
    from starseg.inference.predictor import load
    from starseg.methods import Method, register_method
    from starseg.models.foreign.module import register_model

__version__ = "0.1.0"
__all__ = ["Method", "adopt", "load", "load_config", "register_method", "register_model", "train"]

deprecation.install()

# Loaded on first use, so that the command line answers before torch is imported.
_API = {
    "adopt": "starseg.adoption.api",
    "train": "starseg.experiments.train",
    "load_config": "starseg.config",
    "load": "starseg.inference.predictor",
    "Method": "starseg.methods",
    "register_method": "starseg.methods",
    "register_model": "starseg.models.foreign.module",
}


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'starseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
