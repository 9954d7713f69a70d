"""starseg: class-incremental semantic segmentation by prototype replay (STAR, NeurIPS 2023)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from starseg.utils import deprecation

if TYPE_CHECKING:
    from starseg.config import load_config
    from starseg.engine.runner import train
    from starseg.inference.predictor import load
    from starseg.methods import Method, register_method

__version__ = "0.1.0"
__all__ = ["Method", "load", "load_config", "register_method", "train"]

deprecation.install()

# Loaded on first use, so that the command line answers before torch is imported.
_API = {
    "train": "starseg.engine.runner",
    "load_config": "starseg.config",
    "load": "starseg.inference.predictor",
    "Method": "starseg.methods",
    "register_method": "starseg.methods",
}


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'starseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
