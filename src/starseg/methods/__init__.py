"""Incremental learning methods: every module of this package registers its own."""

from __future__ import annotations

import importlib
import pkgutil

from starseg.methods.base import METHODS, Method, StepContext, method_options, register_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Method", "StepContext", "method_options", "register_method"]
