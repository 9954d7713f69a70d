"""Class-incremental learning methods; importing this package registers every method that it defines.

Other packages add methods through entry points of the group ``starseg.methods``, each of which names a module (or an
object in one) that registers methods when it is imported. The environment variable ``STARSEG_METHODS`` names single
files, as in ``STARSEG_METHODS=gentle.py``, separated by ``:``.
"""

from __future__ import annotations

import importlib
import pkgutil

from starseg.methods.protocol import (
    METHODS,
    Method,
    Stage,
    StepContext,
    method_options,
    prediction_rule,
    register_method,
)
from starseg.methods.recipes import Recipe, StepSchedule, from_recipe, register_recipe
from starseg.methods.sigmoid import SigmoidMethod
from starseg.methods.softmax import SoftmaxMethod
from starseg.utils.plugins import load_entry_points, load_files

ENTRY_POINTS, FILES = "starseg.methods", "STARSEG_METHODS"

__all__ = [
    "METHODS",
    "Method",
    "Recipe",
    "SigmoidMethod",
    "SoftmaxMethod",
    "Stage",
    "StepContext",
    "StepSchedule",
    "from_recipe",
    "method_options",
    "prediction_rule",
    "register_method",
    "register_recipe",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
load_entry_points(ENTRY_POINTS, "method")
load_files(FILES)
