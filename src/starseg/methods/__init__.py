"""Incremental learning methods: every module of this package registers its own.

Other packages add theirs through entry points of the group ``starseg.methods``, each naming a module (or an object in
it) that registers methods when it is imported. A file alone is named by the environment: ``STARSEG_METHODS=gentle.py``,
several with ``:`` between them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from starseg.errors import UserError
from starseg.methods.protocol import METHODS, Method, StepContext, method_options, register_method
from starseg.methods.recipes import Recipe, StepSchedule, from_recipe, register_recipe
from starseg.methods.sigmoid import SigmoidMethod
from starseg.methods.softmax import SoftmaxMethod

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
    "load_entry_points",
    "load_files",
    "method_options",
    "register_method",
    "register_recipe",
]


def load_entry_points() -> None:
    """Import what other packages register.

    Raises:
        UserError: one of them cannot be imported.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever a foreign module does when it is imported
            raise UserError(
                f"method {entry.name!r} of the installed package {entry.dist.name if entry.dist else '?'} cannot be "
                f"loaded ({entry.value}): {type(error).__name__}: {error}"
            ) from error


def load_files() -> None:
    """Import the files that the environment names; a process that a run starts does so too.

    Raises:
        UserError: one of them is not there or cannot be imported.
    """
    for path in map(Path, filter(None, os.environ.get(FILES, "").split(os.pathsep))):
        main = getattr(sys.modules["__main__"], "__file__", None)
        if main and path.resolve() == Path(main).resolve():
            continue  # It registers its methods itself, being run.
        spec = spec_from_file_location(path.stem, path)
        if path.suffix != ".py" or not path.is_file() or spec is None or spec.loader is None:
            raise UserError(f"{FILES}: {path} is no Python file; give one, or several with {os.pathsep!r} between them")
        sys.modules[path.stem] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a foreign module does when it is imported
            raise UserError(f"{FILES}: {path} cannot be loaded: {type(error).__name__}: {error}") from error


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
load_entry_points()
load_files()
