"""Incremental learning methods: every module of this package registers its own.

Other packages add theirs through entry points of the group ``starseg.methods``, each naming a module (or an object in
it) that registers methods when it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from starseg.errors import UserError
from starseg.methods.base import METHODS, Method, StepContext, method_options, register_method

ENTRY_POINTS = "starseg.methods"

__all__ = ["METHODS", "Method", "StepContext", "load_entry_points", "method_options", "register_method"]


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


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
load_entry_points()
