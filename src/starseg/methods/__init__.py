"""Incremental learning methods: every module of this package registers its own.

Other packages add theirs through entry points of the group ``starseg.methods``, each naming a module (or an object in
it) that registers methods when it is imported. A file alone is named by the environment: ``STARSEG_METHODS=gentle.py``,
several with ``:`` between them.
"""

from __future__ import annotations

import importlib
import pkgutil

from starseg.methods.protocol import METHODS, Method, StepContext, method_options, register_method
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
    "StepContext",
    "StepSchedule",
    "from_recipe",
    "method_options",
    "register_method",
    "register_recipe",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
load_entry_points(ENTRY_POINTS, "method")
load_files(FILES)
